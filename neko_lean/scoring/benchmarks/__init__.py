"""Published unlearning benchmarks: their rows, and their metrics as OpenUnlearning computes them."""

from neko_lean.scoring.benchmarks.answers import EncodeRows
from neko_lean.scoring.benchmarks.muse import MuseRows, muse_scores, read_muse
from neko_lean.scoring.benchmarks.tofu import forget_truth_ratios, tofu_scores
from neko_lean.scoring.benchmarks.tofu_rows import (
    TOFU_SPLITS,
    TofuReference,
    TofuRow,
    TofuRows,
    read_tofu,
    read_tofu_reference,
)

__all__ = [
    "TOFU_SPLITS",
    "EncodeRows",
    "MuseRows",
    "TofuReference",
    "TofuRow",
    "TofuRows",
    "forget_truth_ratios",
    "muse_scores",
    "read_muse",
    "read_tofu",
    "read_tofu_reference",
    "tofu_scores",
]
