"""Documents: whole texts without a prompt, for membership inference attacks, held-out text and the anchor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from neko_lean.data.example_types import COLUMNS
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
    return to_documents(read_records(path, hint))


def read_records(path: RowSource, hint: str) -> list[Record]:
    """The rows that `read_documents` finds in `path`, before they are validated; raises NekoLeanError as it does."""
    records = list(_records(path, hint))
    if not records:
        raise NekoLeanError(
            f"{path if isinstance(path, (str, Path)) else 'the data'} contains no documents; expected at least one."
        )
    return records


def to_documents(records: Sequence[Record]) -> list[Document]:
    """Validate rows and turn them into documents; raises NekoLeanError as `read_documents` does."""
    column = text_column(records) or _TEXT_COLUMNS[0]
    return [_document(record, column) for record in records]


def text_column(records: Sequence[Record]) -> str | None:
    """The column with the texts of documents, or None if there is none.

    In rows with all columns of `Example.row`, which are prompts with answers, `document` is an identifier.
    """
    names = {name for _, values in records for name in values}
    if names.issuperset(COLUMNS):
        return None
    return next((name for name in _TEXT_COLUMNS if name in names), None)


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
