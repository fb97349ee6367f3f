"""Losses are weighted sums that do not change with padding, order or grouping."""

import pytest
import torch

from neko_lean.errors import NekoLeanError
from neko_lean.objectives import cross_entropy, gradient_ascent, teacher_kl, token_weights


def test_reductions_by_hand():
    row = torch.tensor([3, 3, 3, 7])
    assert token_weights(row, "tokens").tolist() == [0.25] * 4
    assert token_weights(row, "positions", 10).tolist() == pytest.approx([0.1] * 4)
    assert token_weights(row, "rows").tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])
    assert token_weights(row[:0], "rows").shape == (0,)
    with pytest.raises(NekoLeanError, match="reduction"):
        token_weights(row, "sum")


@pytest.mark.parametrize("reduction", ["tokens", "rows"])
def test_order_of_tokens_does_not_matter(reduction):
    row, logp = torch.tensor([0, 0, 1, 2, 2, 2]), -torch.rand(6)
    order = torch.randperm(6)
    one = gradient_ascent(logp, token_weights(row, reduction))
    two = gradient_ascent(logp[order], token_weights(row[order], reduction))
    torch.testing.assert_close(one, two)


def test_signs_and_values():
    logp, weights = torch.tensor([-1.0, -3.0]), torch.tensor([0.5, 0.5])
    assert gradient_ascent(logp, weights).item() == -2.0
    assert cross_entropy(logp, weights).item() == 2.0
    assert teacher_kl(-logp, weights).item() == 2.0
    assert gradient_ascent(logp[:0], weights[:0]).item() == 0.0
