"""Read an earlier score from its folder, and check everything that later computations use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from neko_lean.data import TASKS, Example, Record, read_jsonl, read_text
from neko_lean.data.examples import Kind
from neko_lean.errors import NekoLeanError
from neko_lean.models import is_inside
from neko_lean.scoring.score_folder import GENERATIONS, SCORES
from neko_lean.scoring.task import SCORE_NAMES, SPLITS, cell_parts, score_name
from neko_lean.scoring.uncertainty import GEOMETRIC, KEYS, example_of
from neko_lean.scoring.values import LARGEST_VALUE

EXAMPLE_KINDS = get_args(Kind)
AGAIN = "score that model again"
REPLACED = ("degenerate",)  # numbers of older versions that measured something else


def read_score(folder: str | Path, examples: Sequence[tuple[str, Example]] | None = None) -> dict[str, Any]:
    """Read an earlier score.

    Args:
        folder: the output of `score`.
        examples: pairs of split and example that it must be a score of; None for any.

    Returns:
        The content of its scores.json, and under `lines` the rows of its generations.jsonl.

    Raises:
        NekoLeanError: the folder holds no score, or one of a version that wrote no numbers per row, or of other rows;
            or a value that is needed is missing or of the wrong type.
    """
    path = Path(folder)
    for name in (SCORES, GENERATIONS):
        if not (path / name).is_file():
            raise NekoLeanError(f"{path} holds no {name}: give a folder that `score` wrote.")
        if not is_inside(path, name):
            raise NekoLeanError(f"{path / name} is a link to a file outside its folder: copy the file itself there.")

    lines = [_checked_line(record, path) for record in read_jsonl(path / GENERATIONS)]
    by_id = {(line["split"], line["id"]): line for line in lines}
    if not lines or len(by_id) < len(lines):
        problem = "has a duplicate row" if lines else "holds no rows"
        raise NekoLeanError(f"{path / GENERATIONS} {problem}: {AGAIN}.")
    if examples is not None:
        expected = {(split, example.id): example for split, example in examples}
        if expected.keys() != by_id.keys() or not all(_matches(by_id[key], expected[key]) for key in expected):
            raise NekoLeanError(f"{path} is a score of other rows, so a difference would mean nothing: {AGAIN}.")
    return {**_checked_scores(path / SCORES), "lines": lines}


def _matches(line: Mapping[str, Any], example: Example) -> bool:
    """Whether a line is a score of this example; texts may have been removed from the line, but not changed."""
    texts = (("input", example.input), ("output", example.output))
    same_group = line["task"] == example.task and line["kind"] == score_name(example)
    return same_group and all(line.get(key, text) == text for key, text in texts)


def _checked_line(record: Record, folder: Path) -> dict[str, Any]:
    """A line of generations.jsonl, after checking every value that is used."""
    where, line = record
    if not isinstance(line.get("id"), str) or not isinstance(line.get("numbers"), dict):
        raise NekoLeanError(f"{folder} was scored by an older neko-lean: {AGAIN}.")
    for key, allowed in (("split", SPLITS), ("kind", SCORE_NAMES)):
        if line.get(key) not in allowed:
            raise NekoLeanError(f"{where}, key {key}: expected one of {', '.join(allowed)}; {AGAIN}.")
    if not isinstance(line.get("task"), str) or not line["task"]:
        raise NekoLeanError(f"{where}, key task: expected the name of a group; {AGAIN}.")
    if line.get("example_kind") not in (None, *EXAMPLE_KINDS):
        raise NekoLeanError(f"{where}, key example_kind: expected one of {', '.join(EXAMPLE_KINDS)}; {AGAIN}.")
    if line.get("document") is not None and not isinstance(line["document"], str):
        raise NekoLeanError(f"{where}, key document: expected a text; {AGAIN}.")
    if line["kind"] not in _possible_scores(line):
        raise NekoLeanError(f"{where}, key kind: does not match the kind of the row; {AGAIN}.")

    if not is_number(line.get("score"), 0, 1):
        raise NekoLeanError(f"{where}, key score: expected a number from 0 to 1; {AGAIN}.")
    if line.get("unicode_score") is not None and not is_number(line["unicode_score"], 0, 1):
        raise NekoLeanError(f"{where}, key unicode_score: expected a number from 0 to 1; {AGAIN}.")
    line = {**line, "numbers": {name: value for name, value in line["numbers"].items() if name not in REPLACED}}
    for name, value in line["numbers"].items():
        if name not in KEYS:
            raise NekoLeanError(f"{where}, key numbers: {name[:40]!r} is unknown to this neko-lean; {AGAIN}.")
        low = 1 if name in GEOMETRIC else -LARGEST_VALUE
        if value is not None and not is_number(value, low):
            raise NekoLeanError(f"{where}, key numbers.{name}: expected a finite number; {AGAIN}.")
    return line


def _possible_scores(line: Mapping[str, Any]) -> tuple[str, ...]:
    """How the row may be scored. In groups other than LUME's, this depends on the answer, which may be removed."""
    example = example_of(line)
    return SCORE_NAMES if example.kind == "qa" and example.task not in TASKS else (score_name(example),)


def is_number(value: Any, low: float = -LARGEST_VALUE, high: float = LARGEST_VALUE) -> bool:
    """Whether a value from JSON is a finite number within these bounds."""
    return not isinstance(value, bool) and isinstance(value, int | float) and low <= value <= high


def _checked_scores(file: Path) -> dict[str, Any]:
    """The object in scores.json, after checking that it holds no NaN or infinity and its main values' types."""
    try:
        scores: Any = json.loads(read_text(file))
        damaged = not isinstance(scores, dict) or not _is_finite(scores)
    except (ValueError, RecursionError) as error:
        raise NekoLeanError(f"{file} cannot be read as JSON: {AGAIN}.") from error
    if damaged:
        raise NekoLeanError(f"{file} is not a JSON object of finite numbers: {AGAIN}.")

    for key, (is_valid, expected) in _EXPECTED.items():
        required = key in ("model", "cells")
        value = scores.get(key)
        if not (is_valid(value) or (value is None and not required)):
            raise NekoLeanError(f"{file}, key {key}: expected {expected}; {AGAIN}.")
    return cast("dict[str, Any]", scores)


def _is_finite(tree: Any) -> bool:
    """Whether no number in nested objects and lists is NaN, infinite, or larger than any measured number."""
    pending = [tree]
    while pending:  # not recursive: json.loads accepts deeper nesting than the recursion limit allows
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, int | float) and not abs(value) <= LARGEST_VALUE:  # NaN, too
            return False
    return True


def _are_cells(value: Any) -> bool:
    known = isinstance(value, Mapping) and all(cell_parts(name) is not None for name in value)
    return known and all(cell is None or is_number(cell, 0, 1) for cell in value.values())


def _is_nll(value: Any) -> bool:
    return is_number(value, 0)


# The main values of scores.json: a check, and what an error says was expected.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a text"),
    "cells": (_are_cells, "cells named split.group.score, each from 0 to 1 or null"),
    "unicode_cells": (_are_cells, "cells named split.group.score, each from 0 to 1 or null"),
    "held_nll": (_is_nll, "a number >= 0, or null"),
    "nonmember_nll": (_is_nll, "a number >= 0, or null"),
}
