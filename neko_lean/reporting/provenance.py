"""The report's last section: how each model was trained and scored, and with which versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from neko_lean.reporting.figures import Model
from neko_lean.reporting.table import Cell, Group, Table, make_line, make_table
from neko_lean.reporting.values import format_bytes, format_duration, mapping, text
from neko_lean.scoring import number

Column = Callable[[Model], Cell]


def provenance_tables(models: Sequence[Model]) -> list[Table]:
    """Tables of how the models were scored and trained: settings, recipes, versions."""

    def group(title: str, lines: Mapping[str, Column]) -> Group:
        return Group(title, [make_line(models, name, "", cell) for name, cell in lines.items()])

    made = make_table("How they were made", "", [group("Run", _RUN_LINES), group("Score", _SCORE_LINES)])
    recipe_keys = _plain_keys([model.run for model in models], "recipe")
    recipes = {key: partial(_block_cell, block="recipe", key=key) for key in recipe_keys}
    version_keys = _plain_keys([*(model.run for model in models), *(model.scores for model in models)], "versions")
    versions = {key: partial(_block_cell, block="versions", key=key) for key in version_keys}
    tables = [
        made,
        make_table("Recipes, every value", "", [group("", recipes)]),
        make_table("Versions", "", [group("", versions)]),
    ]
    return [table for table in tables if table]


def _cell(value: Any) -> Cell:
    """A plain value as text."""
    if value is None or value == "":
        return Cell("–", missing=True)  # noqa: RUF001
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    return Cell(f"{value:.10g}" if isinstance(value, float) else str(value))


def _score_cell(*path: str) -> Column:
    """A text or number from scores.json."""
    return lambda model: _cell(text(model.scores, *path) or number(model.scores, *path))


def _run_cell(*path: str) -> Column:
    """A text or number from run.json."""
    return lambda model: _cell(text(model.run, *path) or number(model.run, *path))


def _formatted(tree: Callable[[Model], Any], key: str, formatter: Callable[[float], str]) -> Column:
    """A number formatted as a duration or size."""

    def cell(model: Model) -> Cell:
        value = number(tree(model), key)
        return _cell(None if value is None else formatter(value))

    return cell


def _block_cell(model: Model, block: str, key: str) -> Cell:
    """A value from an object in run.json, or from the same object in scores.json."""
    return _cell(mapping(model.run, block).get(key, mapping(model.scores, block).get(key)))


_SCORE_LINES: dict[str, Column] = {
    "model": _score_cell("model"),
    "forget rows": _score_cell("rows", "forget"),
    "retain rows": _score_cell("rows", "retain"),
    "maximum new tokens": _score_cell("max_new_tokens"),
    "precision": _score_cell("dtype"),
    "device": _score_cell("device"),
    "duration": _formatted(lambda model: model.scores, "wall_seconds", format_duration),
}
_RUN_LINES: dict[str, Column] = {
    "started from": _run_cell("model"),
    "recipe": _run_cell("recipe", "name"),
    "steps": _run_cell("steps"),
    "weights of step": _run_cell("weights_of_step"),
    "ended": _run_cell("ended"),
    "seed": _run_cell("seed"),
    "device": _run_cell("device"),
    "duration": _formatted(lambda model: model.run, "wall_seconds", format_duration),
    "peak memory, measured": _formatted(lambda model: model.run, "measured_peak", format_bytes),
    "peak memory, predicted": _formatted(lambda model: model.run, "predicted_peak", format_bytes),
}


def _plain_keys(sources: Sequence[dict[str, Any]], block: str) -> list[str]:
    """The keys of an object that have plain values in some source, in order of appearance."""
    pairs = [pair for source in sources for pair in mapping(source, block).items()]
    return list(dict.fromkeys(key for key, value in pairs if value is None or isinstance(value, str | int | float)))
