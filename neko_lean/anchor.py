"""Anchor text: neutral documents, held still like retain rows so that forgetting stays inside the forget set."""

from __future__ import annotations

from pathlib import Path

from neko_lean.data import Row, read_jsonl
from neko_lean.errors import NekoLeanError

TASK = "anchor"


def read_anchor(path: str | Path) -> list[Row]:
    """The documents of a jsonl file with a `document` column, as rows without a prompt.

    Raises NekoLeanError naming file and row when one is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise NekoLeanError(f"{path} does not exist: an anchor is a jsonl file with a column document.")
    rows = []
    for number, raw in enumerate(read_jsonl(path), start=1):
        text = raw.get("document")
        if not isinstance(text, str) or not text.strip():
            raise NekoLeanError(f"{path}, row {number}, column document: expected text.")
        rows.append(Row(f"{TASK} {number}", "", text, TASK))
    if not rows:
        raise NekoLeanError(f"{path} holds no documents.")
    return rows
