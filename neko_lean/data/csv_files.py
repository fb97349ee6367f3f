"""Read CSV files, and files with tabs instead of commas, strictly."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from neko_lean.data.files import Record, read_text, refuse_duplicate_columns, shorten_name
from neko_lean.errors import NekoLeanError, first_line

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def read_csv(file: Path, columns: Sequence[str] = (), separator: str = ",") -> Iterator[Record]:
    """Yield the rows of a CSV file whose first row names the columns. Empty lines are skipped.

    Args:
        file: The file to read.
        columns: Columns that the file must have. It may have others.
        separator: The character between two cells: a comma or a tab.

    Raises:
        NekoLeanError: If a row has more or fewer cells than the header, a quote is not closed or not doubled, or the
            header lacks a column, repeats one or has another separator.
    """
    rows = csv_cells(file, strict=True, separator=separator)
    _, header = next(rows, (0, None))
    if header is None:
        return
    _check_header(header, columns, f"{file}, header", separator)
    name = {",": "comma", "\t": "tab"}[separator]

    for number, (line, cells) in enumerate(rows, start=1):
        where = f"{file}, row {number} (line {line})"
        counts = f"the row has {len(cells)} cells but the header has {len(header)}"
        if len(cells) < len(header):
            missing = shorten_name(header[len(cells)])
            raise NekoLeanError(
                f"{where}: column '{missing}' is missing; {counts}, so write every cell, including empty ones."
            )
        if len(cells) > len(header):
            raise NekoLeanError(
                f"{where}: the text after column '{shorten_name(header[-1])}' belongs to no column; {counts}, so put "
                f"cells that contain a {name} in double quotes."
            )
        yield Record(where, dict(zip(header, cells, strict=True)))


def csv_cells(file: Path, *, strict: bool, separator: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each non-empty row, with the number of the line in which the row starts, counted from 1.

    Args:
        file: The file to read. Its cells may have any length.
        strict: Refuse quotes that are not closed or not doubled.
        separator: The character between two cells.

    Raises:
        NekoLeanError: If the file cannot be parsed.
    """
    text = read_text(file)
    reader = csv.reader(io.StringIO(text, newline=""), strict=strict, delimiter=separator)
    default_limit = csv.field_size_limit()
    rows_read = line = 0

    try:
        while True:
            line = reader.line_num + 1
            # The size limit is global to the process, so raise it for one row at a time.
            csv.field_size_limit(max(default_limit, len(text)))
            try:
                cells = next(reader)
            finally:
                csv.field_size_limit(default_limit)
            if cells:
                yield line, cells
                rows_read += 1
    except StopIteration:
        return
    except csv.Error as error:
        kind = "TSV" if separator == "\t" else "CSV"
        # The header is not counted, so the row being read has the number of rows already read.
        where = f"{file}, row {rows_read} (line {line})" if rows_read else f"{file}, line {line}"
        raise NekoLeanError(
            f"{where} is not valid {kind} ({first_line(error)}); close every quoted cell and double the quotes inside "
            f"it."
        ) from error


def _check_header(header: list[str], columns: Sequence[str], where: str, separator: str) -> None:
    for other, name in _SEPARATORS.items():
        if len(header) == 1 and other != separator and other in header[0]:
            raise NekoLeanError(
                f"{where}: the columns are separated by {name}; separate them with {_SEPARATORS[separator]}."
            )

    refuse_duplicate_columns(header, where)

    for column in columns:
        if column not in header:
            # Do not quote other names: if the header is missing, this is a row of private data.
            similar = [f"'{shorten_name(name)}'" for name in header if name.strip().lower() == column]
            hint = f"; rename {similar[0]} to '{column}'" if similar else ""
            raise NekoLeanError(
                f"{where}: column '{column}' is missing, expected the columns {', '.join(columns)}{hint}."
            )
