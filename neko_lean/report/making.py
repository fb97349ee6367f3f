"""The report's foot: how each model was trained and scored, and with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from neko_lean.report.figures import Model
from neko_lean.report.tables import Cell, Group, Table, line, table
from neko_lean.report.values import duration, gibibytes, mapping, number, text


def made_with(models: Sequence[Model]) -> list[Table]:
    """How each was scored, trained, and with what: settings, recipe, versions."""

    def words(value: Any) -> Cell:
        if value is None or value == "":
            return Cell("–", missing=True)  # noqa: RUF001
        if isinstance(value, bool):
            return Cell("yes" if value else "no")
        return Cell(f"{value:.10g}" if isinstance(value, float) else str(value))

    def seconds(value: float | None) -> Cell:
        return words(None if value is None else duration(value))

    def size(value: float | None) -> Cell:
        return words(None if value is None else gibibytes(value))

    def value(one: Model, block: str, key: str) -> Cell:
        return words(mapping(one.about, block).get(key, mapping(one.scores, block).get(key)))

    def group(title: str, wanted: Mapping[str, Callable[[Model], Cell]]) -> Group:
        return Group(title, [line(models, name, "", make) for name, make in wanted.items()])

    scored = {
        "model": lambda one: words(text(one.scores, "model")),
        "forget rows": lambda one: words(number(one.scores, "rows", "forget")),
        "retain rows": lambda one: words(number(one.scores, "rows", "retain")),
        "most new tokens": lambda one: words(number(one.scores, "max_new_tokens")),
        "precision": lambda one: words(text(one.scores, "dtype")),
        "device": lambda one: words(text(one.scores, "device")),
        "took": lambda one: seconds(number(one.scores, "wall_seconds")),
    }
    trained = {
        "started from": lambda one: words(text(one.about, "model")),
        "recipe": lambda one: words(text(one.about, "recipe", "name")),
        "steps": lambda one: words(number(one.about, "steps")),
        "weights of step": lambda one: words(number(one.about, "weights_of_step")),
        "ended": lambda one: words(text(one.about, "ended")),
        "seed": lambda one: words(number(one.about, "seed")),
        "device": lambda one: words(text(one.about, "device")),
        "took": lambda one: seconds(number(one.about, "wall_seconds")),
        "peak memory, measured": lambda one: size(number(one.about, "measured_peak")),
        "peak memory, predicted": lambda one: size(number(one.about, "predicted_peak")),
    }
    tables = [table("How they were made", "", [group("Run", trained), group("Score", scored)])]
    recipe = _plain([one.about for one in models], "recipe")
    libraries = _plain([*(one.about for one in models), *(one.scores for one in models)], "versions")
    for title, block, keys in (("Recipes, every value", "recipe", recipe), ("Versions", "versions", libraries)):
        tables.append(table(title, "", [group("", {key: partial(value, block=block, key=key) for key in keys})]))
    return [one for one in tables if one]


def _plain(sources: Sequence[dict[str, Any]], block: str) -> list[str]:
    """The keys of `block` whose values are plain, in the order in which they come."""
    pairs = [pair for one in sources for pair in mapping(one, block).items()]
    return list(dict.fromkeys(key for key, value in pairs if value is None or isinstance(value, str | int | float)))
