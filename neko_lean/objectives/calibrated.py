"""The default objective: each token is forgotten down to the loss that it would have if unseen, and no further."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from neko_lean.objectives.reductions import row_sums
from neko_lean.objectives.registry import Hyperparameter, TokenInputs, forget_objective

# Unlikelihood clamps log q to this: float32 keeps 1 - q to three digits here, and above it the gradient is 0.
MAX_LOGP = -1e-4


LEVEL = Hyperparameter(
    5.0, "loss in nats at which a token counts as forgotten, without an anchor or a base cache", positive=False
)


@forget_objective("calibrated", levels=True, hyperparameters={"level": LEVEL})
def calibrated(inputs: TokenInputs, *, level: float) -> Tensor:
    """Gradient ascent that stops at each token's level, see `push_to_levels`."""
    return push_to_levels(inputs)


def push_to_levels(inputs: TokenInputs) -> Tensor:
    """Gradient ascent that stops at each token's level: bounded below by 0, so training cannot diverge.

    A token whose loss is below its level is pushed by max(0, log q + level) and by unlikelihood, -log(1 - q) (arXiv
    1908.04319, eq. 3), minus its value at the level. Ascent alone barely starts where the model is certain, because its
    gradient on the logits is 1 - q; that of unlikelihood is q. Forgetting one token also changes others, so an example
    whose mean loss exceeds the mean of its levels is pulled back by the difference.
    """
    assert inputs.levels is not None
    logp, levels, weights = inputs.logp, inputs.levels, inputs.weights
    push = F.relu(logp + levels) + F.relu(_unlikelihood(logp) - _unlikelihood(-levels))  # [n]
    excess, _ = row_sums(weights * (-logp - levels), inputs.row)  # [R]
    return (weights * push).sum() + F.relu(excess).sum()


def _unlikelihood(logp: Tensor) -> Tensor:
    """-log(1 - q), from log q."""
    return -torch.log(-torch.expm1(logp.clamp(max=MAX_LOGP)))
