"""Models and steps on fake tensors."""

import torch

from neko_lean.memory.fake_step import fake_model, fake_tensors
from tests.memory.configs import OLMO_1B


def test_a_fake_model_has_no_storage():
    with fake_tensors():
        lm = fake_model(OLMO_1B, torch.bfloat16)
    assert lm.head.shape == (50304, 2048) and lm.embedding is not lm.head
