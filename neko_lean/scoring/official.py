"""The results file of the shared task, with its keys (evaluate_generations.py of SemEval-2025 Task 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from neko_lean.data import Example
from neko_lean.scoring.task import SCORE_NAMES, SPLITS, aggregate_terms, cell_parts, score_name


def official_results(
    scores: Mapping[str, Any], scored: Mapping[str, Sequence[tuple[Example, float]]]
) -> dict[str, Any]:
    """The content of the official evaluation_results.json.

    Data with other groups than the shared task's has its own groups. A missing cell is None, and so is the aggregate;
    the official script averages over it or turns it into NaN. The aggregate score is -1 unless all three parts were
    measured, as in the official script.

    Args:
        scores: the content of scores.json.
        scored: the examples of each split with their scores.
    """
    results: dict[str, Any] = {}
    for split in SPLITS:
        part: dict[str, Any] = {}
        for name in SCORE_NAMES:
            values = [score for example, score in scored[split] if score_name(example) == name]
            part[f"overall-{name}-score"] = fmean(values) if values else None
        for cell in scores["cells"]:
            of_split, task, _ = cell_parts(cell) or ("", "", "")
            if of_split == split:
                part[task] = {f"{name}-score": scores["cells"].get(f"{split}.{task}.{name}") for name in SCORE_NAMES}
        results[f"{split}-set"] = part

    results["aggregated-terms"] = [
        None if value is None else aggregate_terms({cell: value})[0] for cell, value in scores["cells"].items()
    ]
    results["harmonic-mean-task-aggregate"] = scores["task_aggregate"]
    if scores["membership"] is not None:
        results["mia_loss_acc"] = scores["membership"]["auc"]
        results["mia_final_score"] = scores["membership"]["score"]
    if scores["mmlu"] is not None:
        results["mmlu_average"] = scores["mmlu"]["micro"]
    results["aggregate-score"] = -1 if scores["final"] is None else scores["final"]
    return results
