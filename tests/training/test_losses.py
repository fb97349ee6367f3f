"""How far a batch is forgotten; the losses themselves are tested with the batch."""

import pytest
import torch

from neko_lean.training.losses import forgotten_share


def test_forgotten_share():
    logp, levels = torch.tensor([-1.0, -3.0, -9.0, -1.0]), torch.tensor([4.0, 4.0, 2.0, 4.0])
    row = torch.tensor([3, 3, 5, 8])
    assert forgotten_share(logp, levels, row).item() == pytest.approx((4 / 8 + 1 + 1 / 4) / 3)
    assert forgotten_share(-levels, levels, row).item() == 1
    assert forgotten_share(torch.zeros(4), levels, row).item() == 0
    assert forgotten_share(logp, torch.zeros(4), row).item() == 1  # nothing is left to forget
