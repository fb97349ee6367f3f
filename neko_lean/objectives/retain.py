"""Objectives on the retain set: stay close to the teacher, or to the text."""

from __future__ import annotations

from torch import Tensor

from neko_lean.objectives.reductions import focal_mean
from neko_lean.objectives.registry import TokenInputs, retain_objective

# KL in nats below which positions of the retain set count the same.
UNIFORM_BELOW = 0.01


@retain_objective("kl", teacher_top_k=True)
def teacher_kl(inputs: TokenInputs) -> Tensor:
    """KL(teacher || student) in nats a position (arXiv 2310.10683, eq. 5), from the cached top-k distribution."""
    assert inputs.teacher_kl is not None
    return (inputs.weights * inputs.teacher_kl).sum()


@retain_objective("focal_kl", teacher_top_k=True)
def focal_teacher_kl(inputs: TokenInputs) -> Tensor:
    """KL(teacher || student) in nats, in which the positions count most at which the student has drifted furthest.

    A retain answer that shares its form with forget answers is lost in a few tokens, which the mean over all positions
    of a step hides: documents have a hundred tokens for each of them.
    """
    assert inputs.teacher_kl is not None
    return focal_mean(inputs.teacher_kl, inputs.weights, UNIFORM_BELOW)


@retain_objective("ce")
def cross_entropy(inputs: TokenInputs) -> Tensor:
    """Negative log-likelihood in nats a token: plain fine-tuning."""
    return -(inputs.weights * inputs.logp).sum()
