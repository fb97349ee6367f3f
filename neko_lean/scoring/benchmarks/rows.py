"""Read the rows of benchmark files: JSON Lines whose columns are texts or lists of texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from neko_lean.data import Record, is_file, read_jsonl
from neko_lean.errors import NekoLeanError


def benchmark_rows(folder: Path, names: tuple[str, ...], benchmark: str) -> Iterator[Record]:
    """Yield the rows of the first of these files that the folder contains.

    Args:
        folder: the benchmark's folder.
        names: names of the file, in order of preference.
        benchmark: name of the benchmark, for the error message.

    Raises:
        NekoLeanError: none of the files exists, or the file has no rows.
    """
    file = next((folder / name for name in names if is_file(folder / name)), None)
    if file is None:
        raise NekoLeanError(f"{folder / names[0]} does not exist; {benchmark} needs this JSON Lines file.")

    count = 0
    for record in read_jsonl(file):
        count += 1
        yield record
    if not count:
        raise NekoLeanError(f"{file} contains no rows; expected at least one.")


def text_of(record: Record, column: str) -> str:
    """The text in a column.

    Raises:
        NekoLeanError: the column is missing, is not a string or is empty.
    """
    text = record.values.get(column)
    if not isinstance(text, str) or not text.strip():
        raise NekoLeanError(f"{record.where}: column '{column}' must be a non-empty string.")
    return text


def texts_of(record: Record, column: str) -> tuple[str, ...]:
    """The list of texts in a column.

    Raises:
        NekoLeanError: the column is missing, or is not a non-empty list of non-empty strings.
    """
    texts = record.values.get(column)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise NekoLeanError(f"{record.where}: column '{column}' must be a list of one or more non-empty strings.")
    return tuple(texts)
