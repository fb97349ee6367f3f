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
    parts = cell_parts(cell)
    if parts is None:
        return cell
    _, key, score = parts
    group = "" if key == DEFAULT_GROUP else " ".join(key.split())  # a line break would break a table or a sentence
    if score == "knowledge":
        return f"questions about {group}" if group else "questions"
    noun = "documents" if key in TASKS else "texts"
    return f"{noun} of {group}" if group else noun
