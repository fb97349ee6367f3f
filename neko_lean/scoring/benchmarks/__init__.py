"""Published unlearning benchmarks: their rows, and their metrics as OpenUnlearning computes them."""

from neko_lean.scoring.benchmarks.muse import MuseRows, muse_scores, read_muse
from neko_lean.scoring.benchmarks.tofu import forget_truth_ratios, tofu_scores
from neko_lean.scoring.benchmarks.tofu_rows import (
    TOFU_SPLITS,
    TofuRow,
    TofuRows,
    read_tofu,
)

__all__ = [
    "TOFU_SPLITS",
    "MuseRows",
    "TofuRow",
    "TofuRows",
    "forget_truth_ratios",
    "muse_scores",
    "read_muse",
    "read_tofu",
    "tofu_scores",
]
