"""Objectives: one function each, in a file per method, registered with what it requires.

Importing a file registers its objectives, so a new one needs its file and a line here.
"""

from neko_lean.objectives import ascent, base_kl, calibrated, dpo, edited_kl, npo, retain, undial
from neko_lean.objectives.reductions import REDUCTIONS, focal_mean, row_sums, token_weights
from neko_lean.objectives.registry import (
    FORGET_OBJECTIVES,
    RETAIN_OBJECTIVES,
    Hyperparameter,
    Objective,
    TokenInputs,
    forget_objective,
    retain_objective,
)

__all__ = [
    "FORGET_OBJECTIVES",
    "REDUCTIONS",
    "RETAIN_OBJECTIVES",
    "Hyperparameter",
    "Objective",
    "TokenInputs",
    "ascent",
    "base_kl",
    "calibrated",
    "dpo",
    "edited_kl",
    "focal_mean",
    "forget_objective",
    "npo",
    "retain",
    "retain_objective",
    "row_sums",
    "token_weights",
    "undial",
]
