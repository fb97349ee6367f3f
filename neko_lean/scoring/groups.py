"""The block `groups` of scores.json: numbers of the examples of each split, group and kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neko_lean.scoring.task import knowledge, normalised_match, unicode_regurgitation
from neko_lean.scoring.uncertainty import (
    NUM_RESAMPLES,
    Estimate,
    Line,
    documents_by_stratum,
    example_of,
    interval,
    paired_differences,
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
TEXTS = ("output", "generation", "window")  # the keys of a line from which `line_numbers` computes


# Split, group and kind of example.
GroupKey = tuple[str, str, str]


def group_scores(lines: Sequence[Line], num_resamples: int = NUM_RESAMPLES) -> list[dict[str, Any]]:
    """Numbers of each split, group and kind of example, with 95 % intervals over documents.

    Args:
        lines: the lines of generations.jsonl, with texts.
        num_resamples: number of resamples of the bootstrap.

    Returns:
        One entry for each split, group and kind, in the order of the lines: split, group, kind, rows, and for each of
        NUMBERS its value and interval, None if no line has the number.
    """
    members = _members(lines)
    entries = []
    for key, numbers in _group_estimates(lines, num_resamples).items():
        entry: dict[str, Any] = {**dict(zip(("split", "group", "kind"), key, strict=True)), "rows": len(members[key])}
        for name, (value, resampled) in numbers.items():
            entry[name] = {"value": value, "interval": interval(resampled)}
        entries.append(entry)
    return entries


def group_differences(after: Sequence[Line], before: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """The differences of two models' group scores, by the keys of `difference_key`.

    Returns:
        As `differences`; nothing if texts were removed from the lines, because the numbers follow from them.
    """
    if not all(isinstance(line.get(key), str) for line in (*after, *before) for key in TEXTS):
        return {}
    of_after, of_before = (
        {difference_key(*key, name): estimate for key, numbers in groups.items() for name, estimate in numbers.items()}
        for groups in (_group_estimates(after, NUM_RESAMPLES), _group_estimates(before, NUM_RESAMPLES))
    )
    return paired_differences(of_after, of_before)


def difference_key(split: str, group: str, kind: str, name: str) -> str:
    """The key of a number's change in the block `difference` of scores.json."""
    return f"groups.{split}.{group}.{kind}.{name}"


def _members(lines: Sequence[Line]) -> dict[GroupKey, list[Line]]:
    groups: dict[GroupKey, list[Line]] = {}
    for line in lines:
        groups.setdefault((line["split"], line["task"], example_of(line).kind), []).append(line)
    return groups


def _group_estimates(lines: Sequence[Line], num_resamples: int) -> dict[GroupKey, dict[str, Estimate]]:
    """Each of NUMBERS for each split, group and kind, with its values over the resamples."""
    documents = documents_by_stratum(lines)
    weights = resample_weights(documents, num_resamples)
    groups = {}
    for (split, group, kind), members in _members(lines).items():
        stratum = split, group
        indices = [documents[stratum][example_of(line).document] for line in members]
        values = [line_numbers(line) for line in members]
        groups[split, group, kind] = {
            name: _mean([value[name] for value in values], indices, weights[stratum]) for name in NUMBERS
        }
    return groups


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


def _mean(values: Sequence[float | None], indices: Sequence[int], weights: np.ndarray) -> Estimate:
    """The mean of the values that are not None, and of the resamples; `indices` are those of the values' documents."""
    sums = np.zeros((2, weights.shape[1]))  # sum and count by document
    for value, index in zip(values, indices, strict=True):
        if value is not None:
            sums[:, index] += (value, 1)
    total, count = sums.sum(1)
    if not count:
        return None, np.empty(0)

    resampled = weights @ sums.T  # [resamples, 2]
    with np.errstate(invalid="ignore"):  # a resample may draw no document of this kind
        return float(total / count), resampled[:, 0] / resampled[:, 1]
