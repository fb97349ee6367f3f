"""The block `groups` of scores.json: numbers of the examples of each split, group and kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neko_lean.scoring.task import knowledge, normalised_match, unicode_regurgitation
from neko_lean.scoring.uncertainty import (
    NUM_RESAMPLES,
    Line,
    documents_by_stratum,
    example_of,
    interval,
    resample_weights,
)

NUMBERS = (
    "rouge_l_recall",
    "rouge_l_f1",
    "exact_match",
    "normalised_match",
    "answer_probability",
    "extraction_strength",
)


def group_scores(lines: Sequence[Line], num_resamples: int = NUM_RESAMPLES) -> list[dict[str, Any]]:
    """Numbers of each split, group and kind of example, with 95 % intervals over documents.

    Args:
        lines: the lines of generations.jsonl, with texts.
        num_resamples: number of resamples of the bootstrap.

    Returns:
        One entry for each split, group and kind, in the order of the lines: split, group, kind, rows, and for each of
        NUMBERS its value and interval, None if no line has the number.
    """
    documents = documents_by_stratum(lines)
    weights = resample_weights(documents, num_resamples)
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["split"], line["task"], example_of(line).kind), []).append(line)

    entries = []
    for (split, group, kind), members in groups.items():
        stratum = split, group
        indices = [documents[stratum][example_of(line).document] for line in members]
        values = [line_numbers(line) for line in members]
        entry: dict[str, Any] = {"split": split, "group": group, "kind": kind, "rows": len(members)}
        for name in NUMBERS:
            entry[name] = _mean([value[name] for value in values], indices, weights[stratum])
        entries.append(entry)
    return entries


def line_numbers(line: Line) -> Mapping[str, float | None]:
    """The numbers of one line.

    ROUGE-L F1 is that of the generation's first tokens. So is the recall of a line that is scored by exact match, whose
    generation stops once it cannot match any more.
    """
    output, generation, numbers = line["output"], line["generation"], line["numbers"]
    text = line["window"] if line["kind"] == "knowledge" else generation
    return {
        "rouge_l_recall": unicode_regurgitation(output, text),
        "rouge_l_f1": numbers.get("rouge_f1"),
        "exact_match": knowledge(output, generation),
        "normalised_match": normalised_match(output, generation),
        "answer_probability": numbers.get("answer_probability"),
        "extraction_strength": numbers.get("extraction_strength"),
    }


def _mean(values: Sequence[float | None], indices: Sequence[int], weights: np.ndarray) -> dict[str, Any]:
    """The mean of the values that are not None, and its interval; `indices` are those of the values' documents."""
    sums = np.zeros((2, weights.shape[1]))  # sum and count by document
    for value, index in zip(values, indices, strict=True):
        if value is not None:
            sums[:, index] += (value, 1)
    total, count = sums.sum(1)
    if not count:
        return {"value": None, "interval": None}

    resampled = weights @ sums.T  # [resamples, 2]
    with np.errstate(invalid="ignore"):  # a resample may draw no document of this kind
        ends = interval(resampled[:, 0] / resampled[:, 1])
    return {"value": float(total / count), "interval": ends}
