"""Objectives on the retain set: stay close to the teacher, or to the text."""

from __future__ import annotations

from torch import Tensor

from neko_lean.objectives.registry import TokenInputs, retain_objective


@retain_objective("kl", teacher_top_k=True)
def teacher_kl(inputs: TokenInputs) -> Tensor:
    """KL(teacher || student) in nats a position (arXiv 2310.10683, eq. 5), from the cached top-k distribution."""
    assert inputs.teacher_kl is not None
    return (inputs.weights * inputs.teacher_kl).sum()


@retain_objective("ce")
def cross_entropy(inputs: TokenInputs) -> Tensor:
    """Negative log-likelihood in nats a token: plain fine-tuning."""
    return -(inputs.weights * inputs.logp).sum()
