"""Models without storage, and what several steps share."""

import torch

from neko_lean.memory.fake_models import FakeModels, fake_model
from neko_lean.memory.fake_tensors import fake_tensors
from tests.memory.configs import MIDDLE, OLMO_1B


def test_a_fake_model_has_no_storage():
    with fake_tensors():
        lm = fake_model(OLMO_1B, torch.bfloat16)
    assert lm.head.shape == (50304, 2048) and lm.embedding is not lm.head


def test_a_model_is_built_once_and_left_unchanged():
    models = FakeModels.of(MIDDLE)
    with models.use(torch.float32) as (lm, recordings):
        first, forward = lm, lm.backbone.layers[0].forward
        lm.head.requires_grad_(False)
        lm.embedding.grad = torch.empty_like(lm.embedding)
        lm.backbone.layers[0].forward = None
        lm.backbone.register_buffer("scratch", torch.empty(3))
    with models.use(torch.float32) as (lm, again):
        assert lm is first and again is recordings
        assert lm.head.requires_grad and lm.embedding.grad is None
        assert lm.backbone.layers[0].forward == forward and not hasattr(lm.backbone, "scratch")
    with models.use(torch.bfloat16) as (lm, _):
        assert lm is not first and lm.head.dtype == torch.bfloat16
