"""A score as a table for people: one or more side by side, what was not measured called so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from neko_lean.data import TASKS
from neko_lean.scoring.judge import ends, number
from neko_lean.scoring.task import CELLS, KINDS, SPLITS

NOT_MEASURED = "not measured"


Scores = Mapping[str, Any]


# Heading, and where the number stands in scores.json.
BESIDE = (
    ("forget answers in longer text", "leaks.forget.contained"),
    ("forget answers, bare letters", "leaks.forget.alphanumeric"),
    ("forget extraction strength", "memorisation.forget.extraction_strength"),
    ("forget answer probability", "memorisation.forget.answer_probability"),
    ("retain outputs, no language", "outputs.retain.degenerate"),
)


def shown(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A number with its interval, or that it was not measured."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.3f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def score_table(named: Mapping[str, Scores]) -> Group:
    """A table of one or more scores side by side, with notes below; keys are the columns' headings."""
    table = Table()
    table.add_column("")
    for name in named:
        table.add_column(name, justify="right")

    def add(heading: str, value: Callable[[Scores], str]) -> None:
        texts = [value(scores) for scores in named.values()]
        # Side by side there is no room for intervals; the verdicts below have those that matter.
        table.add_row(heading, *(texts if len(texts) == 1 else [text.split(" (")[0] for text in texts]))

    for split in SPLITS:
        for task in TASKS:
            for kind in KINDS.values():
                add(f"{split} {task} {kind}", _at(f"cells.{split}.{task}.{kind}"))
        table.add_section()
    seen = [cell for cell in CELLS if any(_differs(scores, cell) for scores in named.values())]
    for cell in seen:
        add(f"{cell.replace('.', ' ')}, any script", _at(f"unicode_cells.{cell}"))
    if seen:
        table.add_section()
    add("task aggregate", _at("task_aggregate"))
    for heading, key in (("membership AUC", "auc"), ("membership AUC, two-sided", "two_sided_auc")):
        add(heading, lambda scores, key=key: _of_membership(scores, key))  # type: ignore[misc]
    add("membership score", lambda scores: _of_membership(scores, "score"))
    add("MMLU", lambda scores: shown(number(scores, "mmlu", "micro")))
    add("final", _at("final"))
    table.add_section()
    for heading, key in BESIDE:
        add(heading, _at(key))
    return Group(table, *_notes(named))


def _differs(scores: Scores, cell: str) -> bool:
    """Whether what the official arithmetic sees of a cell is not what is there in any script."""
    official, seen = number(scores, "cells", cell), number(scores, "unicode_cells", cell)
    return official is not None and seen is not None and abs(official - seen) > 1e-9


def _at(key: str) -> Callable[[Scores], str]:
    """What stands in scores.json at a dotted key, with its interval."""
    path = key.split(".", 1) if "cells." in key else key.split(".")
    return lambda scores: shown(number(scores, *path), ends(scores, "intervals", key))


def _of_membership(scores: Scores, key: str) -> str:
    return shown(number(scores, "membership", key), ends(scores, "membership", f"{key}_interval"))


def _notes(named: Mapping[str, Scores]) -> list[str]:
    """What has to be known to read the table, and each score's verdict."""
    notes = ["All numbers are 0 to 1. Forget rows: lower is forgotten. Retain rows: higher is kept."]
    if len(named) == 1:
        notes.append("In brackets: 95 % intervals, by documents.")
    missing = [cell for cell in CELLS if any(number(scores, "cells", cell) is None for scores in named.values())]
    if missing:
        notes.append(f"No aggregate: no rows for {', '.join(missing)}.")
    kinds = ("unscorable", "mostly_unseen")
    blind = {split: sum(int(number(scores, "official_blind", split, kind) or 0) for kind in kinds)
             for scores in named.values() for split in SPLITS}  # fmt: skip
    if any(blind.values()):
        notes.append(
            f"The official numbers cannot judge {blind['forget']} forget and {blind['retain']} retain rows, whose "
            f"letters or spaces they do not see: read those of any script."
        )
    for scores in named.values():
        mean, low, members, others = (
            number(scores, "membership", key)
            for key in ("perfect_score_mean", "perfect_score_5th_percentile", "members", "nonmembers")
        )
        if mean is not None and low is not None and members is not None and others is not None:
            notes.append(
                f"A perfect model's membership score averages {mean:.3f} with {members:.0f} + {others:.0f} documents "
                f"(5th percentile {low:.3f})."
            )
            break
    for name, scores in named.items():
        sentences = scores.get("verdict")
        notes += [f"{name}: {sentence}" for sentence in sentences] if isinstance(sentences, list) else []
    return notes
