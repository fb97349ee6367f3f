"""Forgetting towards what the model said before it learned the forget set."""

from __future__ import annotations

from torch import Tensor

from neko_lean.objectives.calibrated import push_to_levels
from neko_lean.objectives.reductions import focal_mean
from neko_lean.objectives.registry import Hyperparameter, TokenInputs, forget_objective

# KL in nats, added where tokens are weighted by it: once all tokens are below it, they weigh the same.
UNIFORM_BELOW = 0.1


@forget_objective(
    "base_kl",
    levels=True,
    base_top_k=True,
    hyperparameters={
        "push": Hyperparameter(1.0, "weight of calibrated's push to the base model's losses", positive=False)
    },
)
def base_kl(inputs: TokenInputs, *, push: float) -> Tensor:
    """KL(base || student) in nats a position, by the base model's cache, plus `push` times the `calibrated` loss.

    On most tokens of a document the base model and the student agree, so an unweighted mean hardly moves the others.
    Each token is weighted by its KL (plus UNIFORM_BELOW), see `focal_mean`.
    """
    assert inputs.base_kl is not None
    return kl_and_push(inputs.base_kl, inputs, push)


def kl_and_push(kl: Tensor, inputs: TokenInputs, push: float) -> Tensor:
    """The focal mean of `kl` [n] from a second teacher, plus `push` times the `calibrated` loss."""
    return focal_mean(kl, inputs.weights, UNIFORM_BELOW) + push * push_to_levels(inputs)
