"""Unlearning objectives."""

from neko_lean.objectives.losses import (
    FORGET,
    REDUCTIONS,
    RETAIN,
    calibrated,
    cross_entropy,
    dpo,
    gradient_ascent,
    npo,
    row_sums,
    simnpo,
    teacher_kl,
    token_weights,
    undial_teacher,
    weighted_ascent,
)

__all__ = [
    "FORGET",
    "REDUCTIONS",
    "RETAIN",
    "calibrated",
    "cross_entropy",
    "dpo",
    "gradient_ascent",
    "npo",
    "row_sums",
    "simnpo",
    "teacher_kl",
    "token_weights",
    "undial_teacher",
    "weighted_ascent",
]
