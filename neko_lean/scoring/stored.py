"""Read an earlier score from its folder, and check all of it that anything is computed from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from neko_lean.data import TASKS, Example, Record, read_jsonl, read_text
from neko_lean.errors import NekoLeanError
from neko_lean.models import is_inside
from neko_lean.scoring.score_folder import GENERATIONS, SCORES
from neko_lean.scoring.task import CELLS, KINDS, SPLITS
from neko_lean.scoring.uncertainty import GEOMETRIC, KEYS

LARGEST = 1e15  # no number that is measured comes near it


AGAIN = "score that model again"


def read_score(folder: str | Path, rows: Sequence[tuple[str, Example]] | None = None) -> dict[str, Any]:
    """An earlier score: its scores.json, with `lines`, the rows of its generations.jsonl.

    Args:
        folder: what `score` wrote.
        rows: pairs of split and row that it must be a score of.

    Raises NekoLeanError where there is none, where it is from before rows had numbers, where a value that something is
    computed from is missing or of another kind than `score` writes, or where it is of other rows.
    """
    path = Path(folder)
    for name in (SCORES, GENERATIONS):
        if not (path / name).is_file():
            raise NekoLeanError(f"{path} holds no {name}: give a folder that `score` wrote.")
        if not is_inside(path, name):
            raise NekoLeanError(f"{path / name} is a link that leads out of its folder: put the file itself there.")

    lines = [_checked_line(record, path) for record in read_jsonl(path / GENERATIONS)]
    scored = {(line["split"], line["id"]): line for line in lines}
    if not lines or len(scored) < len(lines):
        raise NekoLeanError(f"{path / GENERATIONS} holds {'a row twice' if lines else 'no rows'}: {AGAIN}.")
    if rows is not None:
        own = {(split, row.id): row for split, row in rows}
        if own.keys() != scored.keys() or not all(_is_of(scored[key], row) for key, row in own.items()):
            raise NekoLeanError(f"{path} is a score of other rows: the difference would mean nothing.")
    return {**_checked_scores(path / SCORES), "lines": lines}


def _is_of(line: Mapping[str, Any], row: Example) -> bool:
    """Whether a line is a score of this row: texts may have been removed from it, but not changed."""
    return line["task"] == row.task and all(
        line.get(key, text) == text for key, text in (("input", row.input), ("output", row.output))
    )


def _checked_line(record: Record, folder: Path) -> dict[str, Any]:
    """A line of generations.jsonl, if every value that is read from it is of its kind."""
    where, line = record
    if not isinstance(line.get("id"), str) or not isinstance(line.get("numbers"), dict):
        raise NekoLeanError(f"{folder} was scored by an older neko-lean: {AGAIN}.")
    for key, allowed in (("split", SPLITS), ("task", TASKS), ("kind", tuple(KINDS.values()))):
        if line.get(key) not in allowed:
            raise NekoLeanError(f"{where}, key {key}: is not one of {', '.join(allowed)}; {AGAIN}.")
    if KINDS[_kind(line["id"], where)] != line["kind"]:
        raise NekoLeanError(f"{where}, key kind: is not that of the row's id; {AGAIN}.")

    if not is_number(line.get("score"), 0, 1):
        raise NekoLeanError(f"{where}, key score: expected a number from 0 to 1; {AGAIN}.")
    if line.get("unicode_score") is not None and not is_number(line["unicode_score"], 0, 1):
        raise NekoLeanError(f"{where}, key unicode_score: expected a number from 0 to 1; {AGAIN}.")
    for name, value in line["numbers"].items():
        if name not in KEYS:
            raise NekoLeanError(f"{where}, key numbers: {name[:40]!r} is a number of another neko-lean; {AGAIN}.")
        least = 1 if name in GEOMETRIC else -LARGEST
        if value is not None and not is_number(value, least):
            raise NekoLeanError(f"{where}, key numbers.{name}: expected a finite number; {AGAIN}.")
    return line


def _kind(row_id: str, where: str) -> str:
    try:
        return Example(row_id, "", "", "").kind
    except NekoLeanError as error:
        raise NekoLeanError(f"{where}, key id: ends in neither sc<N> nor qa<N>; {AGAIN}.") from error


def is_number(value: Any, least: float = -LARGEST, most: float = LARGEST) -> bool:
    """Whether a value from JSON is a finite number within these bounds."""
    return not isinstance(value, bool) and isinstance(value, int | float) and least <= value <= most


def _checked_scores(file: Path) -> dict[str, Any]:
    """scores.json, if it is an object without NaN or infinity whose main values are of their kind."""
    try:
        scores: Any = json.loads(read_text(file))
        broken = not isinstance(scores, dict) or not _is_finite(scores)
    except (ValueError, RecursionError) as error:
        raise NekoLeanError(f"{file} cannot be read as JSON: {AGAIN}.") from error
    if broken:
        raise NekoLeanError(f"{file} is not a JSON object of finite numbers: {AGAIN}.")

    for key, (is_right, expected) in _KINDS.items():
        required = key in ("model", "cells")
        value = scores.get(key)
        if not (is_right(value) or (value is None and not required)):
            raise NekoLeanError(f"{file}, key {key}: expected {expected}; {AGAIN}.")
    return cast("dict[str, Any]", scores)


def _is_finite(value: Any) -> bool:
    """Whether no number in nested objects and lists is NaN, infinite, or larger than anything that is measured."""
    pending = [value]
    while pending:  # no recursion: what json.loads can nest, a function of ours may not be able to
        one = pending.pop()
        if isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, list):
            pending += one
        elif isinstance(one, int | float) and not abs(one) <= LARGEST:  # NaN too
            return False
    return True


def _are_cells(value: Any) -> bool:
    known = isinstance(value, Mapping) and set(value) <= set(CELLS)
    return known and all(one is None or is_number(one, 0, 1) for one in value.values())


def _is_nll(value: Any) -> bool:
    return is_number(value, 0)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a text"),
    "cells": (_are_cells, "the cells of the task, each from 0 to 1 or null"),
    "unicode_cells": (_are_cells, "the cells of the task, each from 0 to 1 or null"),
    "held_nll": (_is_nll, "a number of at least 0, or null"),
    "nonmember_nll": (_is_nll, "a number of at least 0, or null"),
}
