"""The score: the shared task's own arithmetic over greedy generations, and membership inference."""

from neko_lean.scoring.judge import NO, PARTLY, UNKNOWN, YES, cells_before, judged_cells, mean
from neko_lean.scoring.options import ScoreInputs, ScoreSettings
from neko_lean.scoring.run import score
from neko_lean.scoring.table import score_table
from neko_lean.scoring.task import CELLS, KINDS, SPLITS

__all__ = [
    "CELLS",
    "KINDS",
    "NO",
    "PARTLY",
    "SPLITS",
    "UNKNOWN",
    "YES",
    "ScoreInputs",
    "ScoreSettings",
    "cells_before",
    "judged_cells",
    "mean",
    "score",
    "score_table",
]
