"""Losses are weighted sums that do not change with padding, order or grouping."""

import pytest
import torch

from neko_lean.errors import NekoLeanError
from neko_lean.objectives import (
    calibrated,
    cross_entropy,
    gradient_ascent,
    npo,
    row_sums,
    simnpo,
    teacher_kl,
    token_weights,
    weighted_ascent,
)


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


BETA, GAMMA, LEVEL = 0.3, 0.5, 2.0


def tokens(seed=0):
    """Log-probabilities of tokens of five rows of different lengths, a reference, and which row each belongs to."""
    g = torch.Generator().manual_seed(seed)
    row = torch.repeat_interleave(torch.tensor([4, 0, 7, 2, 9]), torch.tensor([3, 1, 6, 2, 4]))
    logp = (-4 * torch.rand(len(row), generator=g, dtype=torch.float64)).requires_grad_()
    return logp, -4 * torch.rand(len(row), generator=g, dtype=torch.float64), row


def ours(name, logp, reference, row):
    weights = token_weights(row, "rows").double()
    return {
        "wga": lambda: weighted_ascent(logp, weights, BETA),
        "npo": lambda: npo(logp, reference, row, BETA),
        "simnpo": lambda: simnpo(logp, row, BETA, GAMMA),
        "calibrated": lambda: calibrated(logp, weights, LEVEL),
    }[name]()


def naive(name, logp, reference, row):
    """Row by row, as the papers write it."""
    losses = []
    for one in set(row.tolist()):
        own, ref = logp[row == one], reference[row == one]
        if name == "wga":
            losses.append((own.detach().exp() ** BETA * own).mean())
        elif name == "npo":
            losses.append(-2 / BETA * torch.log(torch.sigmoid(-BETA * (own.sum() - ref.sum()))))
        elif name == "simnpo":
            losses.append(-2 / BETA * torch.log(torch.sigmoid(-BETA * own.mean() - GAMMA)))
        else:
            losses.append((torch.clamp(own + LEVEL, min=0) - torch.log(1 - own.exp())).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", ["wga", "npo", "simnpo", "calibrated"])
def test_objectives_and_gradients_are_the_papers(name):
    logp, reference, row = tokens()
    one, two = ours(name, logp, reference, row), naive(name, logp, reference, row)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
    (mine,), (theirs,) = (torch.autograd.grad(x, logp) for x in (one, two))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert mine.abs().max() > 0


@pytest.mark.parametrize("name", ["wga", "npo", "simnpo", "calibrated"])
def test_objectives_do_not_change_with_order_or_split(name):
    logp, reference, row = tokens(1)
    whole = ours(name, logp, reference, row)
    order = torch.randperm(len(row))
    torch.testing.assert_close(ours(name, logp[order], reference[order], row[order]), whole)
    # Rows in two parts, weighed by how many rows each has, are the whole.
    part = row > 3
    parts = [(ours(name, logp[p], reference[p], row[p]), len(set(row[p].tolist()))) for p in (part, ~part)]
    torch.testing.assert_close(sum(loss * n for loss, n in parts) / 5, whole)


def test_bounds_and_limits():
    logp, reference, row = tokens(2)
    low, weights = torch.full((4,), -LEVEL - 8.0, requires_grad=True), torch.full((4,), 0.25)
    loss = calibrated(low, weights, LEVEL)
    assert 0 < loss < 1e-4 and torch.autograd.grad(loss, low)[0].abs().max() < 1e-4
    # A token that the model is sure of is pushed harder, and even a probability of 1 gives numbers.
    sure = torch.tensor([-0.01, -1.0, 0.0], requires_grad=True)
    slope = torch.autograd.grad(calibrated(sure, torch.ones(3), LEVEL), sure)[0]
    assert slope[0] > 50 * slope[1] and slope.isfinite().all()
    # NPO's gradient is that of ascent on the sums as beta goes to 0, but for a factor of the rows' number.
    (small,) = torch.autograd.grad(npo(logp, reference, row, 1e-9), logp)
    torch.testing.assert_close(small, torch.full_like(small, 1 / 5))
    empty = logp[:0], reference[:0], row[:0]
    assert all(ours(name, *empty) == 0 for name in ("wga", "npo", "simnpo", "calibrated"))
    sums, count = row_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5, 3, 5]))
    assert sums.tolist() == [2.0, 5.0] and count.tolist() == [1, 2]
