"""A CausalLM's backbone and head together give the logits of the model."""

import pytest
import torch

from neko_lean.models.lm_head import logits
from neko_lean.models.loading import load_model
from tests.helpers import random_model


@pytest.mark.parametrize("tied", [False, True])
def test_backbone_and_head_give_the_models_logits(world, tmp_path, tied):
    lm = load_model(random_model(world, tmp_path / "m", tied=tied), torch.float32, torch.device("cpu"))
    input_ids = torch.randint(0, lm.head.shape[0], (2, 9))
    mask = torch.ones_like(input_ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        expected = lm.model(input_ids=input_ids, attention_mask=mask).logits
        hidden = lm.hidden(input_ids)  # without the mask, because padding is on the right
    actual = logits(hidden.flatten(0, 1), lm.head).view_as(expected)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
