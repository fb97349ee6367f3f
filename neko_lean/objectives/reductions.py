"""Weighted means over tokens and sums over examples, which all objectives are built from.

They depend on neither padding, nor the order of examples, nor how examples are spread over micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError

REDUCTIONS = ("tokens", "rows", "positions")


def token_weights(row: Tensor, reduction: str, positions: int = 0) -> Tensor:
    """Weights by which a sum over tokens becomes the mean that a recipe asks for.

    Args:
        row: [n] int64, the example that each token belongs to.
        reduction: 'tokens' weighs each token 1 / n: the mean over tokens. 'rows' is the mean over each example's
            tokens, then over the examples that have any. 'positions' weighs each token 1 / `positions`, so that
            padding, and tokens without a loss, count as 0.
        positions: size of the rectangle that the examples form when each is padded to the longest of them.

    Returns:
        [n] float32 weights.

    Example:
        >>> token_weights(torch.tensor([0, 0, 1]), "rows").tolist()
        [0.25, 0.25, 0.5]
    """
    count = max(len(row), 1)
    if reduction == "tokens":
        return torch.full(row.shape, 1.0 / count, device=row.device)
    if reduction == "positions":
        return torch.full(row.shape, 1.0 / max(positions, 1), device=row.device)
    if reduction != "rows":
        raise NekoLeanError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    _, inverse, sizes = row.unique(return_inverse=True, return_counts=True)
    weights: Tensor = (1.0 / sizes[inverse]) / max(len(sizes), 1)
    return weights


def focal_mean(kl: Tensor, weights: Tensor, floor: float) -> Tensor:
    """Mean of a KL in which positions with a large KL count more, as the focal loss does (arXiv 1708.02002).

    Most positions hardly differ, and an unweighted mean hides the few that do. Each weight is multiplied by the
    position's KL plus `floor`, without gradient, and the products are scaled to add up to 1.

    Args:
        kl: [n] nats, with gradient. Rounding may make it slightly negative.
        weights: [n] by the recipe's reduction.
        floor: nats; positions whose KL is far below it count the same.

    Example:
        >>> focal_mean(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.5]), floor=1.0).item()
        2.4000000953674316
    """
    focus = weights * (kl.detach().clamp(min=0) + floor)  # [n]
    return (focus * kl).sum() / focus.sum().clamp(min=1e-30)


def row_sums(values: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of per-token `values` [n] over the R examples that `row` [n] names: sums [R] and token counts [R]."""
    _, inverse, sizes = row.unique(return_inverse=True, return_counts=True)
    return values.new_zeros(len(sizes)).index_add(0, inverse, values), sizes
