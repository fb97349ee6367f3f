"""Whole documents without a prompt: those of the loss attack, and the anchor that is held still like retain rows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from neko_lean.data.examples import TASKS, Example
from neko_lean.data.readers import is_file, read_jsonl
from neko_lean.errors import NekoLeanError

ANCHOR_TASK = "anchor"


class Document(NamedTuple):
    """A text, and which task's it is like; ANCHOR_TASK where that was not said."""

    text: str
    task: str


def read_documents(path: Path, hint: str) -> list[Document]:
    """The texts of a jsonl file: columns `document` and, if wanted, `task`. Raises NekoLeanError naming file, row and
    column; `hint` says what a missing file should have been."""
    if not is_file(path):
        raise NekoLeanError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: {hint}.")
    documents = []
    for where, values in read_jsonl(path):
        text = values.get("document")
        if not isinstance(text, str) or not text.strip():
            raise NekoLeanError(f"{where}, column document: expected text.")
        task = values.get("task", ANCHOR_TASK)
        if task not in (ANCHOR_TASK, *TASKS):
            raise NekoLeanError(f"{where}, column task: is not one of {', '.join(TASKS)}.")
        documents.append(Document(text, task))
    if not documents:
        raise NekoLeanError(f"{path} holds no documents.")
    return documents


def read_anchor(path: str | Path) -> list[Example]:
    """An anchor's documents as rows without a prompt: a cache and a batch hold them as they hold retain rows.

    An optional column `task` says which forget rows a document is like.
    """
    documents = read_documents(Path(path), "an anchor is a jsonl file with a column document")
    return [
        Example(f"{ANCHOR_TASK} {number}", "", text, task) for number, (text, task) in enumerate(documents, start=1)
    ]
