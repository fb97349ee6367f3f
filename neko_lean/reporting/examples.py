"""The report's examples: the rows of the data with every model's generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from neko_lean.reporting.collect import Collected
from neko_lean.reporting.values import text
from neko_lean.scoring import SPLITS, number
from neko_lean.scoring.names import cell_content

NUM_FIRST = {"forget": 3, "retain": 2}  # rows that the page shows before any search
Row = dict[str, Any]


def example_rows(collected: Collected) -> list[Row]:
    """The rows with every model's generation and a note on it; None for a model that was not scored on the row."""
    examples: dict[tuple[str, str], Row] = {}
    for index, scored in enumerate(collected.all):
        for row in scored.rows:
            key = (text(row, "split"), text(row, "id"))
            if key not in examples:
                examples[key] = {
                    "split": key[0],
                    "id": key[1],
                    "task": text(row, "task"),
                    "kind": text(row, "kind"),
                    "name": _row_name(row),
                    "input": text(row, "input"),
                    "output": text(row, "output"),
                    "said": [None] * len(collected.all),
                }
            # Most generations begin with the space that separates them from the prompt.
            examples[key]["said"][index] = [text(row, "generation").lstrip(), _note(row)]
    return list(examples.values())


def _note(row: Mapping[str, Any]) -> str:
    """The score of a generation in words, and whether it was truncated."""
    unicode = number(row, "unicode_score")  # older scores lack it
    score = number(row, "score") if unicode is None else unicode
    if score is None:
        words = ""
    elif text(row, "kind") == "knowledge":
        words = "exact" if score == 1 else "not exact"
    else:
        words = f"ROUGE-L recall {score:.2f}"
    return ", ".join(part for part in (words, "truncated" if text(row, "ended") == "limit" else "") if part)


def _row_name(row: Mapping[str, Any]) -> str:
    """The split and contents of a row's cell: "Forget set, questions about Task1"."""
    split, task, kind = (text(row, key) for key in ("split", "task", "kind"))
    cell = f"{split}.{task}.{kind}"
    content = cell_content(cell)
    return ", ".join(
        part for part in (f"{split.capitalize()} set" if split else "", task if content == cell else content) if part
    )


def first_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows to show first: of each split NUM_FIRST, of different groups and kinds as far as possible."""
    chosen: list[Row] = []
    for split in SPLITS:
        remaining = [row for row in rows if row["split"] == split]
        tasks: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        for _ in range(min(NUM_FIRST[split], len(remaining))):
            # `min` returns the first of equal rows, so the choice does not depend on what the models generated.
            row = min(remaining, key=lambda row: (tasks[row["task"]], kinds[row["kind"]], row["kind"] != "knowledge"))
            remaining.remove(row)
            tasks[row["task"]] += 1
            kinds[row["kind"]] += 1
            chosen.append(row)
    return chosen
