"""Whole documents without a prompt: those of the loss attack, and the anchor that is held still like retain rows."""

from __future__ import annotations

from pathlib import Path

from neko_lean.data import Row, read_jsonl
from neko_lean.errors import NekoLeanError

TASK = "anchor"


def read_documents(path: Path, hint: str) -> list[str]:
    """The `document` texts of a jsonl file. Raises NekoLeanError naming file, row and column; `hint` says what a
    missing file should have been."""
    if not path.is_file():
        raise NekoLeanError(f"{path} does not exist: {hint}.")
    documents = []
    for number, raw in enumerate(read_jsonl(path), start=1):
        text = raw.get("document")
        if not isinstance(text, str) or not text.strip():
            raise NekoLeanError(f"{path}, row {number}, column document: expected text.")
        documents.append(text)
    if not documents:
        raise NekoLeanError(f"{path} holds no documents.")
    return documents


def read_anchor(path: str | Path) -> list[Row]:
    """An anchor's documents as rows without a prompt: a cache and a batch hold them as they hold retain rows."""
    documents = read_documents(Path(path), "an anchor is a jsonl file with a column document")
    return [Row(f"{TASK} {number}", "", text, TASK) for number, text in enumerate(documents, start=1)]
