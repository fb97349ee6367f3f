"""Every objective against the formula of its paper, example by example in float64."""

import pytest
import torch

from neko_lean.objectives import FORGET_OBJECTIVES, RETAIN_OBJECTIVES, TokenInputs, row_sums, token_weights
from neko_lean.objectives.edited_kl import lower_to_level
from neko_lean.objectives.undial import lower_target_logit

BETA, GAMMA = 0.3, 0.5
HYPERPARAMETERS = {
    "wga": {"beta": BETA},
    "npo": {"beta": BETA},
    "simnpo": {"beta": BETA, "gamma": GAMMA},
    "dpo": {"beta": BETA},
    "calibrated": {"level": 5.0},
}
NAMES = list(HYPERPARAMETERS)


def loss(name, inputs):
    registry = FORGET_OBJECTIVES if name in FORGET_OBJECTIVES else RETAIN_OBJECTIVES
    return registry[name].loss(inputs, **HYPERPARAMETERS.get(name, {}))


def calibrated(logp, levels, row, weights):
    return loss("calibrated", TokenInputs(logp, row, weights, levels=levels))


def test_signs_and_values():
    logp, row, weights = torch.tensor([-1.0, -3.0]), torch.tensor([0, 1]), torch.tensor([0.5, 0.5])
    assert loss("ga", TokenInputs(logp, row, weights)).item() == -2.0
    assert loss("ce", TokenInputs(logp, row, weights)).item() == 2.0
    assert loss("kl", TokenInputs(logp, row, weights, teacher_kl=-logp)).item() == 2.0
    assert loss("ga", TokenInputs(logp[:0], row[:0], weights[:0])).item() == 0.0


def tokens(seed=0):
    """Log-probabilities of tokens of five examples of different lengths, a reference, and each token's example."""
    g = torch.Generator().manual_seed(seed)
    row = torch.repeat_interleave(torch.tensor([4, 0, 7, 2, 9]), torch.tensor([3, 1, 6, 2, 4]))
    logp = (-4 * torch.rand(len(row), generator=g, dtype=torch.float64)).requires_grad_()
    return logp, -4 * torch.rand(len(row), generator=g, dtype=torch.float64), row


def ours(name, logp, reference, row):
    preferences = row_sums(reference - logp, row)[0], row_sums(logp - reference, row)[0]
    weights = token_weights(row, "rows").double()
    inputs = TokenInputs(logp, row, weights, reference_logp=reference, levels=1 - reference, preferences=preferences)
    return loss(name, inputs)


def naive(name, logp, reference, row):
    """Example by example, as the papers write it."""
    losses = []
    for one in set(row.tolist()):
        own, ref = logp[row == one], reference[row == one]
        if name == "wga":
            losses.append((own.detach().exp() ** BETA * own).mean())
        elif name == "npo":
            losses.append(-2 / BETA * torch.log(torch.sigmoid(-BETA * (own.sum() - ref.sum()))))
        elif name == "simnpo":
            losses.append(-2 / BETA * torch.log(torch.sigmoid(-BETA * own.mean() - GAMMA)))
        elif name == "dpo":  # of a chosen answer that is as much likelier as the rejected one is less likely
            losses.append(-1 / BETA * torch.log(torch.sigmoid(-2 * BETA * (own.sum() - ref.sum()))))
        else:
            level = 1 - ref
            surprise = torch.clamp(-torch.log(1 - own.exp()) + torch.log(1 - (-level).exp()), min=0)
            push = torch.clamp(own + level, min=0) + surprise
            losses.append(push.mean() + torch.clamp((-own - level).mean(), min=0))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", NAMES)
def test_objectives_and_gradients_are_the_papers(name):
    logp, reference, row = tokens()
    one, two = ours(name, logp, reference, row), naive(name, logp, reference, row)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
    (mine,), (theirs,) = (torch.autograd.grad(x, logp) for x in (one, two))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert mine.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_objectives_do_not_change_with_order_or_split(name):
    logp, reference, row = tokens(1)
    whole = ours(name, logp, reference, row)
    order = torch.randperm(len(row))
    torch.testing.assert_close(ours(name, logp[order], reference[order], row[order]), whole)
    # Rows in two parts, weighed by how many rows each has, are the whole.
    part = row > 3
    parts = [(ours(name, logp[p], reference[p], row[p]), len(set(row[p].tolist()))) for p in (part, ~part)]
    torch.testing.assert_close(sum(loss * n for loss, n in parts) / 5, whole)


def test_calibrated_ends_at_its_levels():
    """Gradient descent on the logits of free tokens: each stops where it should, from above and from below."""
    row, weights = torch.tensor([0, 0, 0, 1, 1, 2]), torch.full((6,), 1 / 6)
    level = torch.tensor([3.0, 0.1, 6.0, 1.0, 5.0, 2.0])
    z = torch.tensor([9.0, 9.0, 9.0, 9.0, 9.0, -12.0], requires_grad=True)
    sgd = torch.optim.Adam([z], lr=0.05)
    for step in range(3000):
        sgd.param_groups[0]["lr"] = 0.05 * (1 - step / 3000)
        sgd.zero_grad()
        loss = calibrated(torch.nn.functional.logsigmoid(z), level, row, weights)
        loss.backward()
        sgd.step()
    assert loss.item() < 1e-2
    reached = -torch.nn.functional.logsigmoid(z).detach()
    torch.testing.assert_close(reached, level, rtol=0.05, atol=0.05)


def test_base_kl_weighs_tokens_by_their_distance_and_adds_the_push():
    logp, reference, row = tokens(3)
    g = torch.Generator().manual_seed(3)
    student = torch.randn(len(row), 7, generator=g, dtype=torch.float64, requires_grad=True)
    base = (3 * torch.randn(len(row), 7, generator=g, dtype=torch.float64)).log_softmax(1)
    weights, levels = token_weights(row, "rows").double(), 1 - reference

    def ours(push):
        q = student.log_softmax(1)
        inputs = TokenInputs(q[:, 0], row, weights, levels=levels, base_kl=(base.exp() * (base - q)).sum(1))
        return FORGET_OBJECTIVES["base_kl"].loss(inputs, push=push)

    def naive(push):
        q = student.log_softmax(1)
        pieces, total = [], 0.0
        for n in range(len(row)):
            kl = sum(base[n, v].exp() * (base[n, v] - q[n, v]) for v in range(7))
            weight = weights[n].item() * (kl.item() + 0.1)
            pieces.append(weight * kl)
            total += weight
        return sum(pieces) / total + push * calibrated(q[:, 0], levels, row, weights)

    for push in (0.0, 1.5):
        torch.testing.assert_close(ours(push), naive(push))
        (mine,), (theirs,) = (torch.autograd.grad(loss(push), student) for loss in (ours, naive))
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().max() > 0
    nothing = TokenInputs(logp[:0], row[:0], weights[:0], levels=levels[:0], base_kl=logp[:0])
    assert FORGET_OBJECTIVES["base_kl"].loss(nothing, push=1.0) == 0


def test_bounds_and_limits():
    logp, reference, row = tokens(2)
    level, of_row, weights = torch.full((4,), 2.0), torch.zeros(4, dtype=torch.int64), torch.full((4,), 0.25)
    assert calibrated(-level, level, of_row, weights).item() == pytest.approx(0, abs=1e-6)
    assert calibrated(-level - 3, level, of_row, weights).item() == pytest.approx(3, rel=1e-5)
    # A token that the model is sure of is pushed harder, and even a probability of 1 gives numbers.
    sure = torch.tensor([-0.01, -1.0, 0.0], requires_grad=True)
    loss = calibrated(sure, level[:3], of_row[:3], torch.ones(3))
    slope = torch.autograd.grad(loss, sure)[0]
    assert slope[0] > 50 * slope[1] and slope.isfinite().all()
    # As beta approaches 0, NPO's gradient approaches that of ascent on the sums, divided by the number of examples.
    inputs = TokenInputs(logp, row, torch.ones(len(row)), reference_logp=reference)
    (small,) = torch.autograd.grad(FORGET_OBJECTIVES["npo"].loss(inputs, beta=1e-9), logp)
    torch.testing.assert_close(small, torch.full_like(small, 1 / 5))
    empty = logp[:0], reference[:0], row[:0]
    assert all(ours(name, *empty) == 0 for name in NAMES)


@pytest.mark.parametrize("strength", [0.5, 10.0])
def test_undial_teacher_is_the_softmax_with_the_target_pushed_down(strength):
    """Against all logits: with every entry kept, and with the target in or outside the top k."""
    torch.manual_seed(0)
    z, target = 3 * torch.randn(12, 9, dtype=torch.float64), torch.arange(12) % 9
    p = z.log_softmax(1)
    wanted = (z - strength * torch.nn.functional.one_hot(target, 9)).log_softmax(1)
    reference = p.gather(1, target[:, None]).squeeze(1)
    for k in (9, 3):
        logp, ids = p.topk(k, dim=1)
        rest = torch.ones_like(z, dtype=torch.bool).scatter_(1, ids, False)
        tail = p.masked_fill(~rest, -torch.inf).logsumexp(1)
        got_ids, got, got_tail = lower_target_logit(ids, logp, tail, target, reference, gamma=strength)
        assert torch.equal(got_ids, ids)
        torch.testing.assert_close(got, wanted.gather(1, ids))
        torch.testing.assert_close(got_tail, wanted.masked_fill(~rest, -torch.inf).logsumexp(1))


def test_the_edited_teacher_lowers_the_target_to_its_level_and_keeps_the_proportions_of_the_rest():
    """Against all logits: with every entry kept, and with the target in or outside the top k."""
    torch.manual_seed(0)
    z, target = 3 * torch.randn(12, 9, dtype=torch.float64), torch.arange(12) % 9
    z[:4, :] += 10 * torch.nn.functional.one_hot(target[:4], 9)  # memorized
    p = z.log_softmax(1)
    reference = p.gather(1, target[:, None]).squeeze(1)
    levels = torch.linspace(0.0, 6.0, 12, dtype=torch.float64)

    # The target keeps its probability if that is low enough already.
    lowered = torch.minimum(reference, -levels.clamp(min=1e-4)).exp()
    wanted = p.exp() * ((1 - lowered) / (1 - reference.exp()))[:, None]
    wanted[torch.arange(12), target] = lowered
    assert wanted.sum(1).tolist() == pytest.approx([1.0] * 12)

    for k in (9, 3):
        logp, ids = p.topk(k, dim=1)
        rest = torch.ones_like(z, dtype=torch.bool).scatter_(1, ids, False)
        tail = p.masked_fill(~rest, -torch.inf).logsumexp(1)
        got_ids, got, got_tail = lower_to_level(ids, logp, tail, target, reference, levels)
        assert torch.equal(got_ids, ids)
        expected = torch.where((ids == target[:, None]).any(1)[:, None], wanted, p.exp())
        torch.testing.assert_close(got.exp(), expected.gather(1, ids))
        torch.testing.assert_close(got_tail.exp(), expected.masked_fill(~rest, 0.0).sum(1))


def test_where_the_teacher_was_certain_the_tail_gets_what_the_target_loses():
    ids, logp = torch.tensor([[5, 0]]), torch.tensor([[0.0, -torch.inf]])
    _, got, tail = lower_to_level(
        ids, logp, torch.tensor([-torch.inf]), torch.tensor([5]), torch.zeros(1), torch.ones(1)
    )
    assert got[0].exp().tolist() == pytest.approx([1 / 2.718281828, 0.0])
    assert tail.exp().item() == pytest.approx(1 - 1 / 2.718281828)
