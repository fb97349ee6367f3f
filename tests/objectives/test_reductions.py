"""Reductions: weights over tokens and sums over examples."""

import pytest
import torch

from neko_lean.errors import NekoLeanError
from neko_lean.objectives import focal_mean, row_sums, token_weights


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


def test_the_focal_mean_is_dominated_by_large_values_and_its_weights_have_no_gradient():
    kl = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    focus = [0.25 * 0.1, 0.25 * 0.6, 0.5 * 2.1]
    mean = focal_mean(kl, weights, floor=0.1)
    assert mean.item() == pytest.approx((focus[1] * 0.5 + focus[2] * 2.0) / sum(focus))
    mean.backward()
    assert kl.grad.tolist() == pytest.approx([value / sum(focus) for value in focus])


def test_the_focal_mean_of_equal_values_is_their_mean_and_that_of_none_is_0():
    weights = torch.full((4,), 0.25)
    assert focal_mean(torch.full((4,), 1.5), weights, floor=0.01).item() == pytest.approx(1.5)
    assert focal_mean(torch.full((4,), -1e-8), weights, floor=0.01).item() == pytest.approx(-1e-8)
    assert focal_mean(torch.empty(0), torch.empty(0), floor=0.01) == 0
