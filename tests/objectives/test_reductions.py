"""Reductions: weights over tokens and sums over examples."""

import pytest
import torch

from neko_lean.errors import NekoLeanError
from neko_lean.objectives import row_sums, token_weights


def test_reductions_by_hand():
    row = torch.tensor([3, 3, 3, 7])
    assert token_weights(row, "tokens").tolist() == [0.25] * 4
    assert token_weights(row, "positions", 10).tolist() == pytest.approx([0.1] * 4)
    assert token_weights(row, "rows").tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])
    assert token_weights(row[:0], "rows").shape == (0,)
    with pytest.raises(NekoLeanError, match="reduction must be one of"):
        token_weights(row, "sum")


@pytest.mark.parametrize("reduction", ["tokens", "rows"])
def test_the_order_of_tokens_does_not_matter(reduction):
    row, logp = torch.tensor([0, 0, 1, 2, 2, 2]), -torch.rand(6)
    order = torch.randperm(6)
    weighted = (token_weights(row, reduction) * logp).sum()
    torch.testing.assert_close((token_weights(row[order], reduction) * logp[order]).sum(), weighted)


def test_sums_over_examples():
    sums, count = row_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5, 3, 5]))
    assert sums.tolist() == [2.0, 5.0] and count.tolist() == [1, 2]
