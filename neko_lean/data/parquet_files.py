"""Read parquet files strictly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from neko_lean.data.files import Record, refuse_duplicate_columns
from neko_lean.errors import NekoLeanError, first_line


def read_parquet(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of a parquet file as Python values.

    Args:
        file: The file to read.
        columns: Columns to read. Those that the file lacks are missing from the records.

    Raises:
        NekoLeanError: If the file is not parquet, repeats a column, or contains a value that cannot be read, such as
            text that is not UTF-8.
    """
    import pyarrow.parquet

    try:
        # Open the file itself: pyarrow's dataset API would turn a parent folder named split=x into a column.
        with pyarrow.parquet.ParquetFile(file) as source:
            names = list(source.schema_arrow.names)
            refuse_duplicate_columns(names, str(file))
            available = [name for name in columns if name in names]
            table = source.read(columns=available)
            num_rows = table.num_rows if available else source.metadata.num_rows
    except NekoLeanError:
        raise
    except Exception as error:  # damaged files raise pyarrow's own errors, OSError, UnicodeDecodeError and others
        raise NekoLeanError(f"{file} is not a readable parquet file ({first_line(error)}).") from error

    cells = {name: _python_values(table.column(name), file, name) for name in available}
    for index in range(num_rows):
        yield Record(f"{file}, row {index + 1}", {name: cells[name][index] for name in available})


def _python_values(column: Any, file: Path, name: str) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
        return values
    except Exception as error:  # text that is not UTF-8, or a time outside Python's range
        row, cause = _first_unreadable(column) or (1, error)
        problem = "is not UTF-8 text" if isinstance(cause, UnicodeDecodeError) else "cannot be read"
        raise NekoLeanError(f"{file}, row {row}: column '{name}' {problem} ({first_line(cause)}).") from error


def _first_unreadable(column: Any) -> tuple[int, Exception] | None:
    """The first row, counted from 1, whose value cannot be converted to Python, and the error."""
    for row, value in enumerate(column, start=1):
        try:
            value.as_py()
        except Exception as error:
            return row, error
    return None
