"""Model outputs that are NaN or infinite are errors, because no result computed from them would be right.

A comparison with NaN is always false, so a broken model could otherwise look like a perfect one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError


def refuse_non_finite_outputs(values: Tensor, what: str) -> None:
    """Raise NekoLeanError if `values`, the model's output for `what`, holds NaN or infinite values."""
    if not bool(torch.isfinite(values).all()):
        raise NekoLeanError(
            f"the model's output for {what} is NaN or infinite, so no result would be right; run with --dtype float32, "
            f"or use a checkpoint whose training did not diverge."
        )


def greedy_tokens(logits: Tensor, what: str) -> Tensor:
    """The most likely token of each row of `logits` [N, V], as [N] int64.

    Raises:
        NekoLeanError: a largest logit is NaN or infinite; NaN would win every comparison.
    """
    largest, tokens = logits.max(1)
    refuse_non_finite_outputs(largest, what)
    return tokens
