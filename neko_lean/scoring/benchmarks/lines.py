"""How the block `benchmark` of scores.json is shown: its numbers with their names, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neko_lean.scoring.values import value_at

# By title of the benchmark: dotted key in the block, name, and meaning of each number.
BENCHMARK_LINES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "TOFU": (
        ("model_utility", "model utility", "harmonic mean of nine numbers on retain set, real authors and world facts"),
        ("forget_quality", "forget quality", "p-value: indistinguishable from the retain-only model if above 0.05"),
        ("privleak", "privleak", "privacy leakage in percent; 0 is best, negative is remembered"),
        ("forget.probability", "forget probability", "mean probability of the true answer, normalized by length"),
        ("forget.rouge", "forget ROUGE-L", "recall of the true answer in the generation"),
        ("forget.truth_ratio", "forget truth ratio", "1 if true and false answers are equally likely"),
        ("forget.extraction_strength", "forget extraction strength", "share generated once the rest is given"),
        ("forget.exact_memorisation", "forget exact memorisation", "share of tokens that are the most likely ones"),
    ),
    "MUSE": (
        ("verbatim_memorisation", "verbatim memorisation", "ROUGE-L F1 of continuations of forget texts"),
        ("knowledge_memorisation", "knowledge memorisation", "ROUGE-L F1 of answers about the forget texts"),
        ("privleak", "privleak", "privacy leakage in percent; 0 is best, negative is remembered"),
        ("utility", "utility", "ROUGE-L F1 of answers about the retain texts"),
    ),
}


def benchmark_title(scores: Mapping[str, Any]) -> str:
    """Name and split of the benchmark of a score, such as "TOFU forget10"; empty without one."""
    name, split = value_at(scores, "benchmark", "name"), value_at(scores, "benchmark", "split")
    title = name.upper() if isinstance(name, str) else ""
    if title not in BENCHMARK_LINES:
        return ""
    return f"{title} {split}" if isinstance(split, str) else title


def format_metric(key: str, value: float | None, missing: str = "not measured") -> str:
    """Format a number of the block; a forget quality may be as small as 1e-50."""
    if value is None:
        return missing
    return f"{value:.1e}" if key == "forget_quality" and 0 < value < 0.001 else f"{value:.3f}"
