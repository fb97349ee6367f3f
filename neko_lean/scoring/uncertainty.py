"""How sure the numbers are: a bootstrap over documents, whose rows stay together, for one model and for two.

A line is one row of generations.jsonl. Which documents a draw takes depends on their names alone, so that two models
scored on the same rows are drawn alike and their difference is that of pairs.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from neko_lean.data import Example
from neko_lean.scoring.task import CELLS, task_aggregate

DRAWS = 2000


Line = Mapping[str, Any]


AGGREGATE = "task_aggregate"


# Where a row's numbers go in scores.json, and the kinds of row that they are of.
GROUPS = {
    "memorisation": (("extraction_strength", "exact_memorisation", "answer_probability", "truth_ratio"), ("sc", "qa")),
    "leaks": (("contained", "alphanumeric", "digits", "within_ten"), ("qa",)),
    "outputs": (("repetition", "degenerate", "entropy"), ("sc", "qa")),
}


KEYS = {name: (group, kinds) for group, (names, kinds) in GROUPS.items() for name in names}


KEYS |= dict.fromkeys(("rouge_f1", "length_ratio"), ("outputs", ("sc",)))


KEYS["answer_rank"] = ("memorisation", ("qa",))


GEOMETRIC = ("answer_rank",)  # a rank in the thousands must not hide all others


def contributions(line: Line) -> Iterator[tuple[str, float]]:
    """The dotted keys of scores.json that a row counts for, and what it adds to their means."""
    yield f"cells.{line['split']}.{line['task']}.{line['kind']}", line["score"]
    if line.get("unicode_score") is not None:  # not in the scores of an older neko-lean
        yield f"unicode_cells.{line['split']}.{line['task']}.{line['kind']}", line["unicode_score"]
    kind = "sc" if line["kind"] == "regurgitation" else "qa"
    for name, value in line["numbers"].items():
        group, kinds = KEYS[name]
        if kind in kinds and value is not None:
            yield f"{group}.{line['split']}.{name}", float(np.log(value)) if name in GEOMETRIC else value


def estimates(lines: Sequence[Line], draws: int = DRAWS) -> dict[str, tuple[float | None, np.ndarray]]:
    """Each number by its dotted key, and its values over the draws [draws]; the task aggregate among them."""
    place: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)  # split and task -> document -> its number
    for line in lines:
        stratum = place[line["split"], line["task"]]
        stratum.setdefault(Example(line["id"], "", "", "").document, len(stratum))
    sums: dict[str, dict[tuple[str, str], np.ndarray]] = defaultdict(dict)  # [2, documents]: sum and count
    for line in lines:
        where = line["split"], line["task"]
        number = place[where][Example(line["id"], "", "", "").document]
        for key, value in contributions(line):
            sums[key].setdefault(where, np.zeros((2, len(place[where]))))[:, number] += (value, 1)
    weights = {where: _weights(where, list(documents), draws) for where, documents in place.items()}
    found: dict[str, tuple[float | None, np.ndarray]] = {}
    for key, parts in sums.items():
        total = sum(part.sum(1) for part in parts.values())
        drawn = sum(weights[where] @ part.T for where, part in parts.items())  # [draws, 2]
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold no row of a rare kind
            value, values = total[0] / total[1], drawn[:, 0] / drawn[:, 1]
        if key.rsplit(".", 1)[1] in GEOMETRIC:
            value, values = np.exp(value), np.exp(values)
        found[key] = float(value), values
    cells = {cell: found[f"cells.{cell}"] for cell in CELLS if f"cells.{cell}" in found}
    drawn = _aggregates({cell: values for cell, (_, values) in cells.items()})
    found[AGGREGATE] = task_aggregate({cell: value for cell, (value, _) in cells.items()}), drawn
    return found


def _weights(where: tuple[str, str], documents: list[str], draws: int) -> np.ndarray:
    """How often each draw takes each document: [draws, documents], by the documents' names."""
    order = np.argsort(documents)
    rng = np.random.default_rng(zlib.crc32("\n".join([*where, *sorted(documents)]).encode()))
    counts = np.empty((draws, len(documents)))
    counts[:, order] = rng.multinomial(len(documents), np.full(len(documents), 1 / len(documents)), size=draws)
    return counts


def _aggregates(cells: Mapping[str, np.ndarray]) -> np.ndarray:
    """`task_aggregate` of each draw; empty where a cell is missing."""
    if len(cells) < len(CELLS):
        return np.empty(0)
    terms = np.stack([1 - drawn if cell.startswith("forget") else drawn for cell, drawn in cells.items()])
    with np.errstate(divide="ignore"):  # a term of 0 makes the mean 0
        aggregates: np.ndarray = len(terms) / (1 / np.maximum(terms, 0)).sum(0)
    return aggregates


def mean_by_document(rows: Sequence[Example], values: Sequence[float]) -> dict[str, Any]:
    """The mean of some rows' values, and its 95 % interval over their documents; None without any row."""
    if not rows:
        return {"mean": None, "interval": None}
    names = sorted({row.document for row in rows})
    number = {name: index for index, name in enumerate(names)}
    sums = np.zeros((2, len(names)))
    for row, value in zip(rows, values, strict=True):
        sums[:, number[row.document]] += (value, 1)
    drawn = _weights(("", ""), names, DRAWS) @ sums.T  # [draws, 2]
    with np.errstate(invalid="ignore"):
        return {"mean": float(sums[0].sum() / sums[1].sum()), "interval": interval(drawn[:, 0] / drawn[:, 1])}


def interval(values: np.ndarray) -> list[float] | None:
    """The 2.5th and 97.5th percentile, or None where there is nothing to take them of."""
    known = values[~np.isnan(values)]
    return [float(end) for end in np.percentile(known, (2.5, 97.5))] if len(known) else None


def intervals(found: Mapping[str, tuple[float | None, np.ndarray]]) -> dict[str, list[float]]:
    """95 % intervals by dotted key."""
    ends = {key: interval(values) for key, (_, values) in found.items()}
    return {key: end for key, end in ends.items() if end is not None}


def differences(after: Sequence[Line], before: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """What two models that were scored on the same rows differ by, second from first, with 95 % intervals."""
    one, two = estimates(after), estimates(before)
    found = {}
    for key in one.keys() & two.keys():
        ends = interval(one[key][1] - two[key][1]) if len(one[key][1]) == len(two[key][1]) else None
        if ends is not None and one[key][0] is not None and two[key][0] is not None:
            found[key] = {"difference": one[key][0] - two[key][0], "interval": ends}  # type: ignore[operator]
    return dict(sorted(found.items()))
