"""Numbers that are NaN or infinite: an error where a result would be wrong, null where only a log holds them.

JSON knows neither, and a comparison with NaN is always false, so that a broken model can look like a perfect one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError


def refuse_non_finite_outputs(values: Tensor, what: str) -> None:
    """Raise NekoLeanError when a model's outputs hold NaN or infinite values; `what` says which, in the singular."""
    if not bool(torch.isfinite(values).all()):
        raise NekoLeanError(
            f"the model's output for {what} is NaN or infinite, so no result would be right: run it with --dtype "
            f"float32, or give a checkpoint whose training did not diverge."
        )


def greedy_tokens(logits: Tensor, what: str) -> Tensor:
    """The likeliest token of each row of logits [N, V]: [N] int64. NaN would win every comparison, and is refused."""
    best, token = logits.max(1)
    refuse_non_finite_outputs(best, what)
    return token
