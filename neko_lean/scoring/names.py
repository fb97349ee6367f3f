"""Names of the cells in plain words, for the verdict, the tables and the report."""

from __future__ import annotations

from neko_lean.data import TASKS
from neko_lean.data.rows import DEFAULT_GROUP
from neko_lean.scoring.task import cell_parts


def cell_name(cell: str) -> str:
    """What a cell covers, with its split: "questions about Task1 (forget set)".

    Args:
        cell: the cell's key in scores.json, such as "forget.Task1.knowledge". Any other text is returned as it is.
    """
    parts = cell_parts(cell)
    return cell if parts is None else f"{cell_content(cell)} ({parts[0]} set)"


def cell_content(cell: str) -> str:
    """`cell_name` without the split: "questions about Task1", or "questions" for data without groups.

    A cell that is scored by ROUGE holds the completions of documents in LUME's data. In other data it may also hold
    questions with long answers, so it is called "texts" there.

    Args:
        cell: the cell's key in scores.json. Any other text is returned as it is.
    """
    if cell_parts(cell) is None:
        return cell
    group, noun = cell_group(cell), cell_noun(cell)
    return f"{noun} {'about' if noun == 'questions' else 'of'} {group}" if group else noun


def cell_group(cell: str) -> str:
    """The group of a cell on one line; empty for data without groups."""
    group = (cell_parts(cell) or ("", "", ""))[1]
    return "" if group == DEFAULT_GROUP else " ".join(group.split())


def cell_noun(cell: str) -> str:
    """What a cell's rows are: "questions", "documents" or "texts"."""
    _, group, score = cell_parts(cell) or ("", "", "")
    if score == "knowledge":
        return "questions"
    return "documents" if group in TASKS else "texts"
