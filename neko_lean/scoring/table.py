"""Scores as a table for the terminal, one or several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from neko_lean.data import TASKS
from neko_lean.scoring.task import CELLS, KINDS, SPLITS
from neko_lean.scoring.values import interval, number

NOT_MEASURED = "not measured"
Scores = Mapping[str, Any]
# Label and dotted key in scores.json of the rows below the task's own numbers.
OTHER_ROWS = (
    ("forget answers in longer text", "leaks.forget.contained"),
    ("forget answers, alphanumeric", "leaks.forget.alphanumeric"),
    ("forget extraction strength", "memorisation.forget.extraction_strength"),
    ("forget answer probability", "memorisation.forget.answer_probability"),
    ("degenerate retain outputs", "outputs.retain.degenerate"),
)


def format_number(value: float | None, ends: Sequence[float] | None = None) -> str:
    """Format a number with its interval, or say that it was not measured."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.3f}" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")


def score_table(named: Mapping[str, Scores]) -> Group:
    """A table of one or more scores side by side, followed by notes and each score's verdict.

    Args:
        named: the scores by column heading.
    """
    table = Table()
    table.add_column("")
    for name in named:
        table.add_column(name, justify="right")

    def add_row(label: str, value: Callable[[Scores], str]) -> None:
        texts = [value(scores) for scores in named.values()]
        # Side by side there is no room for intervals; the verdict has the important ones.
        table.add_row(label, *(texts if len(texts) == 1 else [text.split(" (")[0] for text in texts]))

    for label, value in _cell_rows(named):
        if label is None:
            table.add_section()
        else:
            add_row(label, value)
    for label, key in (
        ("membership AUC", "auc"),
        ("membership AUC, two-sided", "two_sided_auc"),
        ("membership score", "score"),
    ):
        add_row(label, _membership_value(key))
    add_row("MMLU", lambda scores: format_number(number(scores, "mmlu", "micro")))
    add_row("final", _value("final"))
    table.add_section()
    for label, key in OTHER_ROWS:
        add_row(label, _value(key))
    return Group(table, *_notes(named))


def _cell_rows(named: Mapping[str, Scores]) -> list[tuple[str | None, Callable[[Scores], str]]]:
    """Labels and values of the task's cells and aggregate; None as the label starts a section."""
    section = (None, _value(""))
    rows: list[tuple[str | None, Callable[[Scores], str]]] = []
    for split in SPLITS:
        rows += [
            (f"{split} {task} {kind}", _value(f"cells.{split}.{task}.{kind}"))
            for task in TASKS
            for kind in KINDS.values()
        ]
        rows.append(section)
    differing = [cell for cell in CELLS if any(_differs(scores, cell) for scores in named.values())]
    if differing:
        rows += [(f"{cell.replace('.', ' ')}, any script", _value(f"unicode_cells.{cell}")) for cell in differing]
        rows.append(section)
    return [*rows, ("task aggregate", _value("task_aggregate"))]


def _differs(scores: Scores, cell: str) -> bool:
    """Whether a cell's official score differs from the one for any script."""
    official, unicode = number(scores, "cells", cell), number(scores, "unicode_cells", cell)
    return official is not None and unicode is not None and abs(official - unicode) > 1e-9


def _value(key: str) -> Callable[[Scores], str]:
    """A function that formats the number at a dotted key of scores.json with its interval."""
    path = key.split(".", 1) if "cells." in key else key.split(".")
    return lambda scores: format_number(number(scores, *path), interval(scores, "intervals", key))


def _membership_value(key: str) -> Callable[[Scores], str]:
    return lambda scores: format_number(
        number(scores, "membership", key), interval(scores, "membership", f"{key}_interval")
    )


def _notes(named: Mapping[str, Scores]) -> list[str]:
    """Notes that explain the table, and each score's verdict."""
    notes = ["All numbers are 0 to 1. Forget rows: lower is forgotten. Retain rows: higher is preserved."]
    if len(named) == 1:
        notes.append("In parentheses: 95 % confidence intervals over documents.")
    missing = [cell for cell in CELLS if any(number(scores, "cells", cell) is None for scores in named.values())]
    if missing:
        notes.append(f"No aggregate: no rows for {', '.join(missing)}.")
    notes += [*_blind_note(named), *_membership_note(named)]
    for name, scores in named.items():
        sentences = scores.get("verdict")
        notes += [f"{name}: {sentence}" for sentence in sentences] if isinstance(sentences, list) else []
    return notes


def _blind_note(named: Mapping[str, Scores]) -> list[str]:
    """How many rows the official scores cannot judge, if there are any."""
    blind = {
        split: sum(int(number(scores, "official_blind", split, kind) or 0) for kind in ("unscorable", "mostly_unseen"))
        for scores in named.values()
        for split in SPLITS
    }
    if not any(blind.values()):
        return []
    return [
        f"The official scores cannot judge {blind['forget']} forget and {blind['retain']} retain rows, because of "
        f"their script or spacing; read the cells for any script instead."
    ]


def _membership_note(named: Mapping[str, Scores]) -> list[str]:
    """The membership score of a perfect model, from the first scores that have it."""
    for scores in named.values():
        mean, low, members, nonmembers = (
            number(scores, "membership", key)
            for key in ("perfect_score_mean", "perfect_score_5th_percentile", "members", "nonmembers")
        )
        if mean is not None and low is not None and members is not None and nonmembers is not None:
            return [
                f"A perfect model's membership score averages {mean:.3f} with {members:.0f} members and "
                f"{nonmembers:.0f} non-members (5th percentile {low:.3f})."
            ]
    return []
