"""Scores as a table for the terminal, one or several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from neko_lean.scoring.benchmarks.lines import BENCHMARK_LINES, benchmark_title, format_metric
from neko_lean.scoring.membership_headline import strongest_attack
from neko_lean.scoring.names import cell_name
from neko_lean.scoring.task import CELLS, SPLITS, cell_parts, shown_cells
from neko_lean.scoring.values import interval, number, value_at

NOT_MEASURED = "not measured"
Scores = Mapping[str, Any]
# A row's label, the dotted key of its number in scores.json, and a function that formats a model's number.
Row = tuple[str, str, Callable[[Scores], str]]
# Label and dotted key in scores.json of the rows below the task's own numbers.
OTHER_ROWS = (
    ("forget answers in longer text", "leaks.forget.contained"),
    ("forget answers, alphanumeric", "leaks.forget.alphanumeric"),
    ("forget extraction strength", "memorisation.forget.extraction_strength"),
    ("forget answer probability", "memorisation.forget.answer_probability"),
    ("degenerate forget outputs", "outputs.forget.degenerate_text"),
    ("degenerate retain outputs", "outputs.retain.degenerate_text"),
)


def format_number(value: float | None, ends: Sequence[float] | None = None) -> str:
    """Format a number with its interval, or say that it was not measured."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.3f}" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")


def score_table(named: Mapping[str, Scores]) -> Group:
    """A table of one or more scores side by side, followed by notes and each score's verdict.

    One score that knows the model before (`score --before`) has columns for before, after and the change.

    Args:
        named: the scores by column heading.
    """
    if _has_before(named):
        return Group(_comparison(named), *_notes(named))
    table = Table()
    table.add_column("")
    for name in named:
        table.add_column(name, justify="right")

    for number_of_section, rows in enumerate(_sections(named)):
        if number_of_section:
            table.add_section()
        for label, _, value in rows:
            texts = [value(scores) for scores in named.values()]
            # Side by side there is no room for intervals; the verdict has the important ones.
            table.add_row(label, *(texts if len(texts) == 1 else [text.split(" (")[0] for text in texts]))
    return Group(table, *_notes(named))


def _has_before(named: Mapping[str, Scores]) -> bool:
    """Whether this is a single score that knows how its numbers changed."""
    return len(named) == 1 and all(isinstance(scores.get("difference"), Mapping) for scores in named.values())


def _comparison(named: Mapping[str, Scores]) -> Table:
    """The table of a single score next to that of the model before, without the numbers that were not measured."""
    (scores,) = named.values()
    table = Table()
    table.add_column("")
    for name in ("before", "after", "change (95 % interval)"):
        table.add_column(name, justify="right")

    for number_of_section, rows in enumerate(_sections(named)):
        if number_of_section:
            table.add_section()
        for label, key, value in rows:
            after = value(scores).split(" (")[0]
            if after != NOT_MEASURED:
                table.add_row(label, *_before_and_change(scores, key, after))
    return table


def _before_and_change(scores: Scores, key: str, after: str) -> tuple[str, str, str]:
    """The number before, the formatted number after, and the change with its interval; empty if it is not known."""
    value, change = number(scores, *_path(key)), number(scores, "difference", key, "difference")
    if value is None or change is None:
        return "", after, ""
    ends = interval(scores, "difference", key, "interval")
    text = f"{_rounded(change):+.3f}" + (f" ({_rounded(ends[0]):.2f} to {_rounded(ends[1]):.2f})" if ends else "")
    return f"{_rounded(value - change):.3f}", after, text


def _rounded(value: float) -> float:
    """The value with three decimals, and no negative zero."""
    return round(value, 3) + 0.0


def _sections(named: Mapping[str, Scores]) -> list[list[Row]]:
    """The table's rows by section; sections without rows are left out."""
    names = shown_cells(list(named.values()))
    cells = [
        [_row(_cell_label(cell), f"cells.{cell}") for cell in names if cell.startswith(f"{split}.")] for split in SPLITS
    ]
    any_script = [
        _row(f"{_cell_label(cell)}, any script", f"unicode_cells.{cell}")
        for cell in names
        if any(_differs(scores, cell) for scores in named.values())
    ]
    key = "task_aggregate" if names == list(CELLS) else "aggregate"
    headline = [
        _row(key.replace("_", " "), key),
        _strongest_row(named),
        ("membership AUC, loss", "membership.auc", _membership_value("auc")),
        ("membership score", "membership.score", _membership_value("score")),
        _row("MMLU", "mmlu.micro"),
        _row("final", "final"),
    ]
    other = [_row(label, key) for label, key in OTHER_ROWS]
    sections = (*cells, any_script, headline, *_benchmark_sections(named), other, _sampling_section(named))
    return [section for section in sections if section]


def _benchmark_sections(named: Mapping[str, Scores]) -> list[list[Row]]:
    """The metrics of each benchmark that a model was scored on."""
    titles = list(dict.fromkeys(title for scores in named.values() if (title := benchmark_title(scores))))

    def value(title: str, key: str) -> Callable[[Scores], str]:
        return lambda scores: (
            format_metric(key, number(scores, "benchmark", *key.split(".")))
            if benchmark_title(scores) == title
            else NOT_MEASURED
        )

    return [
        [
            (escape(f"{title}: {label}"), f"benchmark.{key}", value(title, key))
            for key, label, _ in BENCHMARK_LINES[title.split()[0]]
        ]
        for title in titles
    ]


def _sampling_section(named: Mapping[str, Scores]) -> list[Row]:
    """The shares of forget rows that leak when decoding greedily and in k samples."""
    counts = {count for scores in named.values() for point in _samples(scores) if (count := number(point, "samples"))}

    def value(samples: float) -> Callable[[Scores], str]:
        def of_scores(scores: Scores) -> str:
            point = next((point for point in _samples(scores) if number(point, "samples") == samples), None)
            return format_number(number(point, "leak"), interval(point, "leak_interval"))

        return of_scores

    greedy = [("leaked forget rows, greedy", "", value(0))] if counts else []
    return [*greedy, *((f"leaked forget rows, leak@{count:g}", "", value(count)) for count in sorted(counts))]


def _samples(scores: Scores) -> list[Any]:
    """The points of the sampling attack."""
    points = value_at(scores, "attacks", "sample")
    return points if isinstance(points, list) else []


def _cell_label(cell: str) -> str:
    """A cell's name as a label; group names are shown literally, not as rich's markup."""
    return escape(" ".join(cell_parts(cell) or (cell,)))


def _differs(scores: Scores, cell: str) -> bool:
    """Whether a cell's official score differs from the one for any script."""
    official, unicode = number(scores, "cells", cell), number(scores, "unicode_cells", cell)
    return official is not None and unicode is not None and abs(official - unicode) > 1e-9


def _path(key: str) -> list[str]:
    """The path of a dotted key of scores.json."""
    is_cell = key.startswith(("cells.", "unicode_cells."))  # a cell's name contains dots
    return key.split(".", 1) if is_cell else key.split(".")


def _row(label: str, key: str) -> Row:
    """The row of the number at a dotted key of scores.json, with its interval."""
    path = _path(key)
    return label, key, lambda scores: format_number(number(scores, *path), interval(scores, "intervals", key))


def _strongest_row(named: Mapping[str, Scores]) -> Row:
    """The row of the strongest membership attack, which may be another one for each model."""
    tests = [strongest_attack(scores) for scores in named.values()]
    test = tests[0] if len(tests) == 1 else None
    label = "strongest membership attack" + (f": {escape(test.label)}" if test else "")
    key = test.key if test else ""

    def value(scores: Scores) -> str:
        found = strongest_attack(scores)
        if found is None:
            return NOT_MEASURED
        number_text, *ends = format_number(found.value, found.interval).split(" (")
        return " (".join([number_text if test else f"{number_text} {escape(found.label)}", *ends])

    return label, key, value


def _membership_value(key: str) -> Callable[[Scores], str]:
    return lambda scores: format_number(
        number(scores, "membership", key), interval(scores, "membership", f"{key}_interval")
    )


def _notes(named: Mapping[str, Scores]) -> list[str]:
    """Notes that explain the table, and each score's verdict."""
    notes = ["All numbers are 0 to 1. Forget rows: lower is forgotten. Retain rows: higher is preserved."]
    if any(benchmark_title(scores) for scores in named.values()):
        notes[0] = notes[0].replace(".", ", except privleak, which is in percent and best at 0.", 1)
    if _has_before(named):
        notes.append("In parentheses: 95 % intervals of the change, over documents.")
    elif len(named) == 1:
        notes.append(
            "In parentheses: 95 % intervals over documents; that of the strongest attack allows for its choice."
        )
    shown = shown_cells(list(named.values()))
    missing = [cell for cell in shown if any(number(scores, "cells", cell) is None for scores in named.values())]
    if missing and shown == list(CELLS):
        words = ", ".join(cell_name(cell) for cell in missing)
        notes.append(f"No aggregate: no rows for {words}.")
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
