"""From a loaded model to the numbers of scores.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neko_lean.data import Example
from neko_lean.scoring import uncertainty
from neko_lean.scoring.benchmarks.option import benchmark_scores
from neko_lean.scoring.documents import ReferenceLosses, held_out_nll, measure_membership
from neko_lean.scoring.generation import Generation
from neko_lean.scoring.groups import group_differences, group_scores
from neko_lean.scoring.inputs import ScoreData
from neko_lean.scoring.limits import BATCH_TOKENS
from neko_lean.scoring.measure import ScoringContext, example_numbers, generation_line
from neko_lean.scoring.membership_headline import membership_tests
from neko_lean.scoring.mmlu import mmlu
from neko_lean.scoring.task import SPLITS, aggregate, cell_means, is_lume_data, missing_cells, task_aggregate
from neko_lean.scoring.values import number
from neko_lean.terminal import progress_bar

DEFAULT_SHOTS = 5
# Dotted keys of numbers whose change has no interval.
MAIN_NUMBERS = ("membership.auc", "membership.score", "mmlu.micro", "final")


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Attributes:
        lines: the lines of generations.jsonl.
        scores: the blocks of scores.json that do not come from the examples' scores.
    """

    lines: list[dict[str, Any]]
    scores: dict[str, Any]


def measure_all(
    context: ScoringContext,
    data: ScoreData,
    generations: Sequence[Generation],
    reference: ReferenceLosses | None,
    shots: int | None,
) -> Measured:
    """Measure the model on the examples, the membership documents, held-out text, MMLU and the benchmark."""
    numbers = example_numbers(context, data.all_examples, generations, data.paraphrases)
    lines = [
        generation_line(split, example, generation, of_example)
        for (split, example), generation, of_example in zip(data.examples, generations, numbers, strict=True)
    ]
    membership = measure_membership(context, data.documents, reference)
    held_nll = held_out_nll(context, data.held_out) if data.held_out else None
    estimates = uncertainty.estimates(lines)
    scores = {
        "membership": membership,
        "mmlu": _measure_mmlu(context, data, DEFAULT_SHOTS if shots is None else shots),
        "benchmark": benchmark_scores(context, data.benchmark, data.all_examples, generations),
        "final": None,  # computed from the complete scores
        **uncertainty.group_means(estimates),
        "held_nll": held_nll,
        "nonmember_nll": None if membership is None else membership["nonmember_loss"],
        "uniform_nll": math.log(len(context.lm.head)),
        "intervals": uncertainty.intervals(estimates),
    }
    return Measured(lines, scores)


def _measure_mmlu(context: ScoringContext, data: ScoreData, shots: int) -> dict[str, Any] | None:
    if data.subjects is None:
        return None
    num_questions = sum(len(subject.test) for subject in data.subjects.values())
    with progress_bar("MMLU", num_questions, "questions", context.quiet) as progress:
        return mmlu(
            context.lm,
            context.tokenizer,
            data.subjects,
            shots=shots,
            batch_tokens=BATCH_TOKENS,
            progress=progress,
        )


def task_scores(data: ScoreData, measured: Measured, blind: Mapping[str, Any]) -> dict[str, Any]:
    """The cells and their aggregates, the cells for any script, and what the official scores cannot judge."""

    def cells(key: str) -> dict[str, float | None]:
        scored: dict[str, list[tuple[Example, float]]] = {split: [] for split in SPLITS}
        for (split, example), line in zip(data.examples, measured.lines, strict=True):
            scored[split].append((example, line[key]))
        return cell_means(scored)

    official = cells("score")
    is_lume = is_lume_data(data.all_examples)
    return {
        "cells": official,
        "unicode_cells": cells("unicode_score"),
        "official_blind": blind,
        "missing_cells": missing_cells(official) if is_lume else [],
        "task_aggregate": task_aggregate(official) if is_lume else None,
        "aggregate": aggregate(official),
        "aggregate_cells": sum(value is not None for value in official.values()),
        "groups": group_scores(measured.lines),
    }


def difference(
    scores: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], before: Mapping[str, Any]
) -> dict[str, Any]:
    """The `difference` block of scores.json: changes since an earlier score of the same rows."""
    changes: dict[str, Any] = {
        "before": before["model"],
        **uncertainty.differences(lines, before["lines"]),
        **group_differences(lines, before["lines"]),
    }
    changes |= main_differences(scores, before)
    for name in ("held_nll", "nonmember_nll"):
        if scores[name] is not None and before.get(name) is not None:
            changes.setdefault("unseen_nll", {"difference": scores[name] - before[name], "interval": None})
    return changes


def main_differences(scores: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Changes of the numbers that no examples belong to: of each membership attack, MMLU and the final score."""
    changes: dict[str, dict[str, Any]] = {}
    for key in (*MAIN_NUMBERS, *(test.key for test in membership_tests(scores))):
        after, start = number(scores, *key.split(".")), number(before, *key.split("."))
        if after is not None and start is not None:
            changes[key] = {"difference": after - start, "interval": None}
    return changes
