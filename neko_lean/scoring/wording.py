"""The names of cells in sentences: a reader never meets a key of scores.json."""

from __future__ import annotations

from typing import Any

from neko_lean.data import TASKS
from neko_lean.scoring.task import SCORE_NAMES, SPLITS, cell_parts
from neko_lean.scoring.values import value_at


def percent(share: float) -> str:
    """Format a share as a percentage, without rounding a small one to zero."""
    return "less than 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def cell_words(cell: str, scores: Any) -> str:
    """What a cell measures, such as "questions about Task1", or "questions" if the scores have only one group."""
    parts = cell_parts(cell)
    if parts is None:
        return cell
    split, group, name = parts
    rows = _kind_of_rows(split, group, name, scores)
    if len(_groups(scores) | {group}) == 1:
        return rows
    return f"{rows} {'about' if rows.startswith('questions') else 'of'} {group}"


def cell_words_with_split(cell: str, scores: Any) -> str:
    """As `cell_words`, with the set: "questions about Task1 in the retain set"."""
    split = cell.partition(".")[0]
    return cell_words(cell, scores) + (f" in the {split} set" if split in SPLITS else "")


def _groups(scores: Any) -> set[str]:
    """The groups of the scores."""
    cells = value_at(scores, "cells")
    names = list(cells) if isinstance(cells, dict) else []
    return {parts[1] for name in names if (parts := cell_parts(name)) is not None}


def _kind_of_rows(split: str, group: str, name: str, scores: Any) -> str:
    """What kind of rows a cell averages; questions with long answers are scored like documents outside LUME."""
    entries = value_at(scores, "groups")
    kinds = {
        entry.get("kind")
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and entry.get("split") == split and entry.get("group") == group
    }
    if group in TASKS:
        return "questions" if name == "knowledge" else "documents"
    if kinds == {"qa"}:
        both = all(value_at(scores, "cells", f"{split}.{group}.{other}") is not None for other in SCORE_NAMES)
        answers = "short" if name == "knowledge" else "long"
        return f"questions with {answers} answers" if both else "questions"
    if name == "knowledge":
        return "questions"
    return "texts" if "qa" in kinds or not kinds else "documents"
