"""Documents: whole texts without a prompt, for membership inference attacks and for the anchor set.

Anchor documents are texts that the model never saw. They are used like retain examples.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from neko_lean.data.examples import TASKS, Example
from neko_lean.data.files import is_file
from neko_lean.data.jsonl_files import read_jsonl
from neko_lean.errors import NekoLeanError

ANCHOR_TASK = "anchor"


class Document(NamedTuple):
    """A text.

    Attributes:
        text: The whole text.
        task: The task whose examples the text resembles, or `ANCHOR_TASK` if the file does not name one.
    """

    text: str
    task: str


def read_documents(path: Path, hint: str) -> list[Document]:
    """Read documents from a jsonl file with the column `document` and, optionally, `task`.

    Args:
        path: The file to read.
        hint: What was expected, for the error message about a missing file.

    Raises:
        NekoLeanError: If there is no such file, or if it is empty or invalid. The message names the row and the column.
    """
    if not is_file(path):
        raise NekoLeanError(f"{path} {'is not a file' if path.exists() else 'does not exist'}; {hint}.")

    documents = []
    for where, values in read_jsonl(path):
        text = values.get("document")
        if not isinstance(text, str) or not text.strip():
            raise NekoLeanError(f"{where}: column 'document' must be a non-empty string.")
        task = values.get("task", ANCHOR_TASK)
        if task not in (ANCHOR_TASK, *TASKS):
            raise NekoLeanError(f"{where}: column 'task' must be one of {', '.join(TASKS)}.")
        documents.append(Document(text, task))

    if not documents:
        raise NekoLeanError(f"{path} contains no documents.")
    return documents


def read_anchor(path: str | Path) -> list[Example]:
    """Read anchor documents as examples with an empty prompt, which caches and batches treat like retain examples.

    The optional column `task` names the task whose forget examples a document resembles.
    """
    documents = read_documents(Path(path), "an anchor is a jsonl file with a column document")
    return [
        Example(f"{ANCHOR_TASK} {number}", "", document.text, document.task)
        for number, document in enumerate(documents, start=1)
    ]
