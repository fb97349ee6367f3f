"""Unlearning losses, as arithmetic on the per-token vectors that `token_stats` gives.

Each is a weighted sum over tokens, or a mean over rows of a function of the row's own tokens; weights say how tokens
count. So a loss does not change with padding, with the order of rows, or with how rows are spread over micro-batches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from neko_lean.errors import NekoLeanError

FORGET = ("none", "ga", "wga", "npo", "simnpo", "dpo", "undial", "calibrated")


RETAIN = ("none", "kl", "ce")


# Nearest to log 1 that unlikelihood looks at. Float32 keeps 1 - q to a thousandth there; above it the gradient is 0.
MAX_LOGP = -1e-4


REDUCTIONS = ("tokens", "rows", "positions")


def token_weights(row: Tensor, reduction: str, positions: int = 0) -> Tensor:
    """Weights [N] for tokens that belong to rows `row` [N] (int64), by one of three reductions.

    'tokens': each token 1 / N: the mean over tokens. 'rows': the mean over each row's tokens, then over the rows that
    have any. 'positions': each token 1 / `positions`, the size of the rectangle that the set's rows make when each is
    padded to the longest of them, so that padding, and a token that gets no loss, counts as 0.
    """
    count = max(len(row), 1)
    if reduction == "tokens":
        return torch.full(row.shape, 1.0 / count, device=row.device)
    if reduction == "positions":
        return torch.full(row.shape, 1.0 / max(positions, 1), device=row.device)
    if reduction != "rows":
        raise NekoLeanError(f"reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}.")
    _, inverse, sizes = row.unique(return_inverse=True, return_counts=True)
    each: Tensor = (1.0 / sizes[inverse]) / max(len(sizes), 1)
    return each


def gradient_ascent(target_logp: Tensor, weights: Tensor) -> Tensor:
    """Mean log-probability of the forget answers: minimising it is ascent on their loss (arXiv 2310.10683, eq. 2)."""
    return (weights * target_logp).sum()


def cross_entropy(target_logp: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihood in nats a token: plain fine-tuning."""
    return -(weights * target_logp).sum()


def teacher_kl(kl: Tensor, weights: Tensor) -> Tensor:
    """KL from the teacher to the student on the retain rows, in nats a position (arXiv 2310.10683, eq. 5)."""
    return (weights * kl).sum()


def weighted_ascent(target_logp: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Gradient ascent in which a token counts by its probability to the power `beta`, which is held constant: what is
    forgotten already is left alone (WGA, arXiv 2502.19301, eq. 10)."""
    return (weights * (beta * target_logp.detach()).exp() * target_logp).sum()


def npo(target_logp: Tensor, reference_logp: Tensor, row: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation: mean over rows of 2 / beta * log(1 + (q / p)^beta), with q and p the student's
    and the teacher's probability of the row's whole answer, a sum of log-probabilities (arXiv 2404.05868, eq. 3)."""
    ratio, _ = row_sums(target_logp - reference_logp, row)
    return 2 / beta * F.softplus(beta * ratio).sum() / max(len(ratio), 1)


def simnpo(target_logp: Tensor, row: Tensor, beta: float, gamma: float) -> Tensor:
    """NPO without a reference: the mean log-probability of a row's tokens, not the sum, takes the ratio's place
    (arXiv 2410.07163, eq. 4)."""
    total, count = row_sums(target_logp, row)
    return 2 / beta * F.softplus(beta * total / count + gamma).sum() / max(len(total), 1)


def dpo(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Direct preference for a substitute over the forgotten answer: mean over rows of -1 / beta * log sigmoid(beta *
    (chosen - rejected)), each [R] a sum over an answer's tokens of the student's less the teacher's log-probability
    (arXiv 2305.18290, eq. 7, scaled by 1 / beta as in arXiv 2404.05868, eq. 2)."""
    return F.softplus(beta * (rejected_ratio - chosen_ratio)).sum() / (beta * max(len(chosen_ratio), 1))


def undial_teacher(
    topk_ids: Tensor, topk_logp: Tensor, tail_logp: Tensor, target: Tensor, reference_logp: Tensor, strength: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's distribution with `strength` taken off the logit of the memorised token, normalised again: what
    UNDIAL distils, by the KL, into the student (arXiv 2402.10052, eq. 3).

    Takes ids and log-probabilities [N, k], tail_logp [N], target [N] and the teacher's log-probability of it [N], as
    token_stats and the cache have them, and gives the first three. A token outside the top k leaves the tail.
    """
    here = (topk_ids == target[:, None]) & (topk_logp > -torch.inf)  # [N, k]
    lost = torch.where(here.any(1), -torch.inf, reference_logp + math.log(-math.expm1(-strength)))  # [N]
    logp = topk_logp - strength * here
    # Where rounding left no more in the tail than what is taken out, nothing stays in it.
    tail = tail_logp + torch.log(-torch.expm1((lost - tail_logp).nan_to_num(-torch.inf).clamp(max=0)))
    total = torch.cat([logp, tail[:, None]], dim=1).logsumexp(1)
    return topk_ids, logp - total[:, None], tail - total


def calibrated(target_logp: Tensor, level: Tensor, row: Tensor, weights: Tensor) -> Tensor:
    """Ascent that stops where an unseen row would be: bounded below by 0, so no run can diverge.

    A token whose loss is below its `level` [n], in nats, is pushed by max(0, log q + level) and by unlikelihood,
    -log(1 - q) (arXiv 1908.04319, eq. 3), less its value at the level. Ascent alone hardly begins where the model is
    sure, as its gradient on the logits is 1 - q there; that of unlikelihood is q. What is learned of one token moves
    others, so a row whose mean loss has passed the mean of its levels is drawn back by as much as it is above.
    """
    push = F.relu(target_logp + level) + F.relu(_unlikelihood(target_logp) - _unlikelihood(-level))
    above, _ = row_sums(weights * (-target_logp - level), row)
    return (weights * push).sum() + F.relu(above).sum()


def _unlikelihood(logp: Tensor) -> Tensor:
    """-log(1 - q), of log q."""
    return -torch.log(-torch.expm1(logp.clamp(max=MAX_LOGP)))


def row_sums(values: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of values [N] over each of the R rows that they belong to, and how many there are: [R], [R]."""
    _, inverse, sizes = row.unique(return_inverse=True, return_counts=True)
    return values.new_zeros(len(sizes)).index_add(0, inverse, values), sizes
