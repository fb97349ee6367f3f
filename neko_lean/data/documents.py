"""Documents: whole texts without a prompt, for membership inference attacks and for the anchor set.

Anchor documents are texts that the model never saw. They are used like retain examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from neko_lean.data.example_types import Example
from neko_lean.data.files import Record, is_file
from neko_lean.data.python_rows import read_python_rows
from neko_lean.data.sources import read_file
from neko_lean.data.text_files import read_text_folder, text_files
from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    from neko_lean.data.examples import RowSource

ANCHOR_TASK = "anchor"

_TEXT_COLUMNS = ("document", "text")  # in order of preference


class Document(NamedTuple):
    """A text.

    Attributes:
        text: The whole text.
        task: The task whose examples the text resembles, or `ANCHOR_TASK` if the file does not name one.
    """

    text: str
    task: str


def read_documents(path: RowSource, hint: str) -> list[Document]:
    """Read documents from a data file, from a folder of text files, or from Python objects.

    A table has the column `document` or `text` and, optionally, `task`.

    Args:
        path: The file or the folder to read; or a list of texts, or of dicts with these columns, a DataFrame or a
            Dataset.
        hint: What was expected, for the error message about a missing file.

    Raises:
        NekoLeanError: If there is no such file, or if it is empty or invalid. The message names the row and the column.
    """
    records = list(_records(path, hint))
    if not records:
        raise NekoLeanError(
            f"{path if isinstance(path, (str, Path)) else 'the data'} contains no documents; expected at least one."
        )

    column = next((name for name in _TEXT_COLUMNS if any(name in values for _, values in records)), _TEXT_COLUMNS[0])
    return [_document(record, column) for record in records]


def read_anchor(path: RowSource) -> list[Example]:
    """Read anchor documents as examples with an empty prompt, which caches and batches treat like retain examples.

    The optional column `task` names the task whose forget examples a document resembles.
    """
    documents = read_documents(path, "an anchor is a jsonl file with a column document")
    return [
        Example(f"{ANCHOR_TASK} {number}", "", document.text, document.task)
        for number, document in enumerate(documents, start=1)
    ]


def _records(source: RowSource, hint: str) -> Iterator[Record]:
    if not isinstance(source, (str, Path)):
        texts = isinstance(source, (list, tuple)) and all(isinstance(item, str) for item in source)
        return read_python_rows([{"document": text} for text in source] if texts else source)
    path = Path(source)
    if is_file(path):
        return read_file(path, (*_TEXT_COLUMNS, "task"))
    if path.is_dir() and text_files(path):
        return read_text_folder(path)
    raise NekoLeanError(f"{path} {'is not a file' if path.exists() else 'does not exist'}; {hint}.")


def _document(record: Record, column: str) -> Document:
    where, values = record
    if column not in values:
        raise NekoLeanError(f"{where}: column '{column}' is missing; expected a column document or text.")
    text = values[column]
    if not isinstance(text, str) or not text.strip():
        raise NekoLeanError(f"{where}: column '{column}' must be a non-empty string.")

    task = values.get("task")
    if task is None:
        return Document(text, ANCHOR_TASK)
    if not isinstance(task, str) or not task.strip():
        raise NekoLeanError(f"{where}: column 'task' must be a non-empty string.")
    return Document(text, task)
