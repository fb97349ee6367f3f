"""The results file of the shared task, with its keys (evaluate_generations.py of SemEval-2025 Task 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from neko_lean.data import TASKS, Example
from neko_lean.scoring.task import CELLS, KINDS, SPLITS


def official_results(
    scores: Mapping[str, Any], scored: Mapping[str, Sequence[tuple[Example, float]]]
) -> dict[str, Any]:
    """The content of the official evaluation_results.json.

    A missing cell is None, and so is the aggregate; the official script averages over it or turns it into NaN. The
    aggregate score is -1 unless all three parts were measured, as in the official script.

    Args:
        scores: the content of scores.json.
        scored: the examples of each split with their scores.
    """
    results: dict[str, Any] = {}
    for split in SPLITS:
        part: dict[str, Any] = {}
        for kind, name in KINDS.items():
            values = [score for example, score in scored[split] if example.kind == kind]
            part[f"overall-{name}-score"] = fmean(values) if values else None
        for task in TASKS:
            part[task] = {f"{name}-score": scores["cells"][f"{split}.{task}.{name}"] for name in KINDS.values()}
        results[f"{split}-set"] = part

    cells = [(cell, scores["cells"][cell]) for cell in CELLS]
    results["aggregated-terms"] = [
        None if value is None else 1 - value if cell.startswith("forget") else value for cell, value in cells
    ]
    results["harmonic-mean-task-aggregate"] = scores["task_aggregate"]
    if scores["membership"] is not None:
        results["mia_loss_acc"] = scores["membership"]["auc"]
        results["mia_final_score"] = scores["membership"]["score"]
    if scores["mmlu"] is not None:
        results["mmlu_average"] = scores["mmlu"]["micro"]
    results["aggregate-score"] = -1 if scores["final"] is None else scores["final"]
    return results
