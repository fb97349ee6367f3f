"""How far a batch is forgotten; the losses themselves are tested with the batch."""

import pytest
import torch

from neko_lean.training.losses import attained_share, forgotten_share


def test_forgotten_share():
    logp, levels = torch.tensor([-1.0, -3.0, -9.0, -1.0]), torch.tensor([4.0, 4.0, 2.0, 4.0])
    row = torch.tensor([3, 3, 5, 8])
    assert forgotten_share(logp, levels, row).item() == pytest.approx((4 / 8 + 1 + 1 / 4) / 3)
    assert forgotten_share(-levels, levels, row).item() == 1
    assert forgotten_share(torch.zeros(4), levels, row).item() == 0
    assert forgotten_share(logp, torch.zeros(4), row).item() == 1  # nothing is left to forget


def test_attained_share():
    """A loss above its level does not make up for one below, as it does in the share of a row."""
    logp, levels = torch.tensor([-1.0, -9.0]), torch.tensor([4.0, 2.0])
    assert attained_share(logp, levels).item() == pytest.approx((1 + 2) / (4 + 2))
    assert forgotten_share(logp, levels, torch.zeros(2, dtype=torch.int64)).item() == 1
    assert attained_share(-levels, levels).item() == 1
    assert attained_share(torch.zeros(2), levels).item() == 0
