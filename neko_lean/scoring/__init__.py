"""Scoring a model: greedy generations, the shared task's metrics, membership inference, attacks, and a verdict."""

from neko_lean.options import ScoreInputs, ScoreSettings
from neko_lean.scoring.attacks import ATTACKS, Attack
from neko_lean.scoring.groups import difference_key
from neko_lean.scoring.judge import NO, PARTLY, UNKNOWN, YES, cells_before, judged_cells, relearned_losses
from neko_lean.scoring.membership_attacks import MEMBERSHIP_ATTACKS
from neko_lean.scoring.membership_headline import MembershipTest, membership_tests, strongest_attack
from neko_lean.scoring.run import score
from neko_lean.scoring.table import score_table
from neko_lean.scoring.task import CELLS, KINDS, SPLITS, cell_parts, shown_cells
from neko_lean.scoring.values import Interval, interval, mean, number, percent, value_at
from neko_lean.scoring.verdict import verdict

__all__ = [
    "ATTACKS",
    "CELLS",
    "KINDS",
    "MEMBERSHIP_ATTACKS",
    "NO",
    "PARTLY",
    "SPLITS",
    "UNKNOWN",
    "YES",
    "Attack",
    "Interval",
    "MembershipTest",
    "ScoreInputs",
    "ScoreSettings",
    "cell_parts",
    "cells_before",
    "difference_key",
    "interval",
    "judged_cells",
    "mean",
    "membership_tests",
    "number",
    "percent",
    "relearned_losses",
    "score",
    "score_table",
    "shown_cells",
    "strongest_attack",
    "value_at",
    "verdict",
]
