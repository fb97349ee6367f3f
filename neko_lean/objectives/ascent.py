"""Gradient ascent on the forget set, plain and weighted by probability."""

from __future__ import annotations

from torch import Tensor

from neko_lean.objectives.registry import Hyperparameter, TokenInputs, forget_objective


@forget_objective("ga")
def gradient_ascent(inputs: TokenInputs) -> Tensor:
    """Mean log-probability of the forget tokens: minimizing it is gradient ascent on their loss (arXiv 2310.10683,
    eq. 2). Unbounded below."""
    return (inputs.weights * inputs.logp).sum()


@forget_objective("wga", hyperparameters={"beta": Hyperparameter(1.0, "power of the probability that weighs a token")})
def weighted_gradient_ascent(inputs: TokenInputs, *, beta: float) -> Tensor:
    """Gradient ascent with each token weighted by its probability to the power `beta`, a constant for the gradient, so
    that tokens that are forgotten already stop counting (WGA, arXiv 2502.19301, eq. 10)."""
    return (inputs.weights * (beta * inputs.logp.detach()).exp() * inputs.logp).sum()
