"""Unlearning losses, as arithmetic on the per-token vectors that `token_stats` gives.

Each is a weighted sum over tokens; the weights say how tokens count. So a loss does not change with padding, with the
order of rows, or with how rows are spread over chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError

FORGET = ("none", "ga")
RETAIN = ("none", "kl", "ce")
REDUCTIONS = ("tokens", "rows", "positions")


def token_weights(row: Tensor, reduction: str, positions: int = 0) -> Tensor:
    """Weights [N] for tokens that belong to rows `row` [N] (int64), by one of three reductions.

    'tokens': each token 1 / N: the mean over tokens. 'rows': the mean over each row's tokens, then over the rows that
    have any. 'positions': each token 1 / `positions`, the rectangle's size, so that padding counts as 0.
    """
    count = max(len(row), 1)
    if reduction == "tokens":
        return torch.full(row.shape, 1.0 / count, device=row.device)
    if reduction == "positions":
        return torch.full(row.shape, 1.0 / max(positions, 1), device=row.device)
    if reduction != "rows":
        raise NekoLeanError(f"reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}.")
    _, inverse, sizes = row.unique(return_inverse=True, return_counts=True)
    return (1.0 / sizes[inverse]) / max(len(sizes), 1)


def gradient_ascent(target_logp: Tensor, weights: Tensor) -> Tensor:
    """Mean log-probability of the forget answers: minimising it is ascent on their loss (arXiv 2310.10683, eq. 2)."""
    return (weights * target_logp).sum()


def cross_entropy(target_logp: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihood in nats a token: plain fine-tuning."""
    return -(weights * target_logp).sum()


def teacher_kl(kl: Tensor, weights: Tensor) -> Tensor:
    """KL from the teacher to the student on the retain rows, in nats a position (arXiv 2310.10683, eq. 5)."""
    return (weights * kl).sum()
