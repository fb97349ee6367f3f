"""Building blocks of the report's tables: cells, lines, groups, with one column per model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from neko_lean.reporting.figures import Model
from neko_lean.reporting.values import NOT_MEASURED, format_change, format_interval, format_number
from neko_lean.scoring import interval, number

COUNTS = ("answer_rank", "questions", "shots")  # keys of numbers of things, which are shown without decimals
SMALL_PRINT = "Small print: 95 % interval, and change from before, if the scores have them."


@dataclass(frozen=True)
class Cell:
    """A value as text, small print below it, and whether it is missing."""

    value: str
    small: list[str] = field(default_factory=list)
    missing: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table: its name, what it means, and a cell for each model."""

    name: str
    note: str
    cells: list[Cell]

    @property
    def is_empty(self) -> bool:
        """Whether no model has a value."""
        return all(cell.missing for cell in self.cells)


@dataclass(frozen=True)
class Group:
    """Lines under a heading, which may be empty."""

    title: str
    lines: list[Line]


@dataclass(frozen=True)
class Table:
    """A table of the page with its heading and a caption."""

    title: str
    caption: str
    groups: list[Group]


def make_line(models: Sequence[Model], name: str, note: str, cell: Callable[[Model], Cell]) -> Line:
    """A line with each model's cell."""
    return Line(name, note, [cell(model) for model in models])


def make_table(title: str, caption: str, groups: Sequence[Group]) -> Table | None:
    """A table without the lines and groups that have no value for any model; None if nothing is left."""
    filled = [Group(group.title, [line for line in group.lines if not line.is_empty]) for group in groups]
    filled = [group for group in filled if group.lines]
    return Table(title, caption, filled) if filled else None


def number_cell(model: Model, *path: str, change: str = "", missing: str = NOT_MEASURED) -> Cell:
    """The cell of a number in scores.json, with its interval and its change from before.

    Args:
        model: the model.
        path: keys of the number.
        change: dotted key of its interval and change; by default its path.
        missing: text of the cell if there is no number.
    """
    value = number(model.scores, *path)
    if value is None:
        return Cell(missing, missing=True)
    if path[-1] in COUNTS:
        return Cell(f"{value:,.0f}")

    key = change or ".".join(path)
    small = [format_interval(interval(model.scores, "intervals", key)), change_note(model, key)]
    return Cell(format_number(value), [line for line in small if line])


def change_note(model: Model, key: str) -> str:
    """The change from before of the number with this dotted key, with its interval; empty if it is not known."""
    difference = number(model.scores, "difference", key, "difference")
    if difference is None:
        return ""
    ends = format_interval(interval(model.scores, "difference", key, "interval"))
    return f"change {format_change(difference)}" + (f" ({ends})" if ends else "")


def number_column(*path: str, change: str = "", missing: str = NOT_MEASURED) -> Callable[[Model], Cell]:
    """A function that makes a model's `number_cell`."""
    return lambda model: number_cell(model, *path, change=change, missing=missing)


def auc_cell(model: Model, *path: str) -> Cell:
    """The cell of the AUC in the block at `path`, with its interval and the two-sided AUC."""
    area, two_sided = number(model.scores, *path, "auc"), number(model.scores, *path, "two_sided_auc")
    if area is None:
        return Cell(NOT_MEASURED, missing=True)
    small = [format_interval(interval(model.scores, *path, "auc_interval"))]
    small.append("" if two_sided is None else f"two-sided {format_number(two_sided)}")
    return Cell(format_number(area), [line for line in small if line])
