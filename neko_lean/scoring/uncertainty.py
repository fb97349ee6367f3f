"""Confidence intervals: a bootstrap over documents, for one model and for the difference of two.

The rows of a document are resampled together. Which documents a resample draws depends only on their names, so two
models scored on the same rows are resampled alike, and their difference is that of pairs. A line is one row of
generations.jsonl.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from neko_lean.data import Example
from neko_lean.scoring.task import CELLS, SPLITS, aggregate, aggregate_terms, is_lume_layout, task_aggregate

NUM_RESAMPLES = 2000
Line = Mapping[str, Any]
# A number's value, and its values over the resamples: [resamples].
Estimate = tuple[float | None, np.ndarray]
# A split and a task; documents are resampled within each.
Stratum = tuple[str, str]
AGGREGATE, TASK_AGGREGATE = "aggregate", "task_aggregate"
CELLS_PREFIX = "cells."
# The group in scores.json that each number of a row belongs to, and the kinds of row that have the number.
GROUPS = {
    "memorisation": (
        ("extraction_strength", "exact_memorisation", "answer_probability", "truth_ratio"),
        ("regurgitation", "knowledge"),
    ),
    "leaks": (("contained", "alphanumeric", "digits", "within_ten"), ("knowledge",)),
    "outputs": (("repetition", "degenerate_text", "degenerate_answer", "entropy"), ("regurgitation", "knowledge")),
}
KEYS = {name: (group, kinds) for group, (names, kinds) in GROUPS.items() for name in names}


KEYS |= dict.fromkeys(("rouge_f1", "length_ratio"), ("outputs", ("regurgitation",)))


KEYS["answer_rank"] = ("memorisation", ("knowledge",))
GEOMETRIC = ("answer_rank",)  # averaged geometrically, so that one rank in the thousands does not dominate the mean


def contributions(line: Line) -> Iterator[tuple[str, float]]:
    """The dotted keys of scores.json to which a row contributes, each with the value to average."""
    yield f"cells.{line['split']}.{line['task']}.{line['kind']}", line["score"]
    if line.get("unicode_score") is not None:  # scores of older versions lack it
        yield f"unicode_cells.{line['split']}.{line['task']}.{line['kind']}", line["unicode_score"]
    for name, value in line["numbers"].items():
        group, kinds = KEYS[name]
        if line["kind"] in kinds and value is not None:
            yield f"{group}.{line['split']}.{name}", float(np.log(value)) if name in GEOMETRIC else value


def estimates(lines: Sequence[Line], num_resamples: int = NUM_RESAMPLES) -> dict[str, Estimate]:
    """Every number by its dotted key, including the aggregates, with its values over the resamples."""
    documents = documents_by_stratum(lines)
    sums = _sums(lines, documents)
    weights = resample_weights(documents, num_resamples)

    results: dict[str, Estimate] = {}
    for key, parts in sums.items():
        total = sum(part.sum(1) for part in parts.values())  # [2]
        resampled = sum(weights[stratum] @ part.T for stratum, part in parts.items())  # [resamples, 2]
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold no row of a rare kind
            value, values = total[0] / total[1], resampled[:, 0] / resampled[:, 1]
        if key.rsplit(".", 1)[1] in GEOMETRIC:
            value, values = np.exp(value), np.exp(values)
        results[key] = float(value), values

    # LUME's cells in their own order, then the others.
    measured = [key.removeprefix(CELLS_PREFIX) for key in results if key.startswith(CELLS_PREFIX)]
    cells = {cell: results[CELLS_PREFIX + cell] for cell in dict.fromkeys((*CELLS, *measured)) if cell in measured}
    values_of_cells = {cell: value for cell, (value, _) in cells.items()}
    aggregates = _aggregates({cell: values for cell, (_, values) in cells.items()})
    results[AGGREGATE] = aggregate(values_of_cells), aggregates
    of_task = task_aggregate(values_of_cells) if is_lume_lines(lines) else None
    results[TASK_AGGREGATE] = of_task, np.empty(0) if of_task is None else aggregates
    return results


def is_lume_lines(lines: Sequence[Line]) -> bool:
    """Whether all lines are of LUME's layout."""
    return is_lume_layout((line["task"], example_of(line).kind) for line in lines)


def example_of(line: Line) -> Example:
    """The example of a line, without texts; lines of older scores state neither kind nor document, only a LUME id."""
    kind: Any = line.get("example_kind") or ""
    return Example(line["id"], "", "", line["task"], kind, line.get("document") or "")


def documents_by_stratum(lines: Sequence[Line]) -> dict[Stratum, dict[str, int]]:
    """The documents of each split and task, with their indices."""
    documents: dict[Stratum, dict[str, int]] = defaultdict(dict)
    for line in lines:
        names = documents[line["split"], line["task"]]
        names.setdefault(example_of(line).document, len(names))
    return documents


def _sums(
    lines: Sequence[Line], documents: Mapping[Stratum, Mapping[str, int]]
) -> dict[str, dict[Stratum, np.ndarray]]:
    """Sum and count of each number's values by document: [2, documents] per dotted key and stratum."""
    sums: dict[str, dict[Stratum, np.ndarray]] = defaultdict(dict)
    for line in lines:
        stratum = line["split"], line["task"]
        index = documents[stratum][example_of(line).document]
        for key, value in contributions(line):
            sums[key].setdefault(stratum, np.zeros((2, len(documents[stratum]))))[:, index] += (value, 1)
    return sums


def resample_weights(documents: Mapping[Stratum, Mapping[str, int]], num_resamples: int) -> dict[Stratum, np.ndarray]:
    """How often each resample draws each document of each stratum: [resamples, documents]."""
    return {stratum: _weights(stratum, list(names), num_resamples) for stratum, names in documents.items()}


def _weights(stratum: Stratum, documents: list[str], num_resamples: int) -> np.ndarray:
    """How often each resample draws each document, by the documents' names: [resamples, documents]."""
    order = np.argsort(documents)
    rng = np.random.default_rng(zlib.crc32("\n".join([*stratum, *sorted(documents)]).encode()))
    probabilities = np.full(len(documents), 1 / len(documents))
    counts = np.empty((num_resamples, len(documents)))
    counts[:, order] = rng.multinomial(len(documents), probabilities, size=num_resamples)
    return counts


def _aggregates(cells: Mapping[str, np.ndarray]) -> np.ndarray:
    """The harmonic mean of the cells in each resample: [resamples]."""
    terms = np.stack(aggregate_terms(cells))
    with np.errstate(divide="ignore"):  # a term of 0 makes the mean 0
        aggregates: np.ndarray = len(terms) / (1 / np.maximum(terms, 0)).sum(0)
    return aggregates


def group_means(results: Mapping[str, Estimate]) -> dict[str, Any]:
    """The blocks memorisation, leaks and outputs of scores.json; None for a number that no row has."""
    groups: dict[str, Any] = {}
    for name, (group, _) in KEYS.items():
        for split in SPLITS:
            value = results.get(f"{group}.{split}.{name}", (None,))[0]
            groups.setdefault(group, {}).setdefault(split, {})[name] = value
    return groups


def mean_by_document(examples: Sequence[Example], values: Sequence[float]) -> dict[str, Any]:
    """The mean of the examples' values and its 95 % interval over documents; None without examples."""
    if not examples:
        return {"mean": None, "interval": None}
    names = sorted({example.document for example in examples})
    indices = {name: index for index, name in enumerate(names)}
    sums = np.zeros((2, len(names)))  # sum and count by document
    for example, value in zip(examples, values, strict=True):
        sums[:, indices[example.document]] += (value, 1)
    resampled = _weights(("", ""), names, NUM_RESAMPLES) @ sums.T  # [resamples, 2]
    with np.errstate(invalid="ignore"):
        ends = interval(resampled[:, 0] / resampled[:, 1])
    return {"mean": float(sums[0].sum() / sums[1].sum()), "interval": ends}


def interval(values: np.ndarray) -> list[float] | None:
    """The 2.5th and 97.5th percentile of the values that are not NaN, or None if there are none."""
    known = values[~np.isnan(values)]
    return [float(end) for end in np.percentile(known, (2.5, 97.5))] if len(known) else None


def intervals(results: Mapping[str, Estimate]) -> dict[str, list[float]]:
    """95 % intervals by dotted key."""
    ends = {key: interval(values) for key, (_, values) in results.items()}
    return {key: end for key, end in ends.items() if end is not None}


def differences(after: Sequence[Line], before: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """The difference of two models scored on the same rows, `after` minus `before`, with 95 % intervals."""
    return paired_differences(estimates(after), estimates(before))


def paired_differences(
    of_after: Mapping[str, Estimate], of_before: Mapping[str, Estimate]
) -> dict[str, dict[str, Any]]:
    """The differences of the estimates that both models have, whose resamples draw the same documents."""
    results = {}
    for key in of_after.keys() & of_before.keys():
        (value_after, resampled_after), (value_before, resampled_before) = of_after[key], of_before[key]
        if value_after is None or value_before is None or len(resampled_after) != len(resampled_before):
            continue
        ends = interval(resampled_after - resampled_before)
        if ends is not None:
            results[key] = {"difference": value_after - value_before, "interval": ends}
    return dict(sorted(results.items()))
