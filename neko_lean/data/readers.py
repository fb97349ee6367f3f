"""Read data files strictly: CSV, JSON Lines and parquet.

Every record is either read as the file has it or refused in one sentence that names the file, the row or line, and the
column. Nothing is dropped, and of two values for one name none is picked.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neko_lean.errors import NekoLeanError, first_line

_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # the byte-order marks of UTF-16, and with two zero bytes of UTF-32


_SURROGATE = re.compile("[\ud800-\udfff]")  # json.loads joins the two halves of a pair


_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class Record(NamedTuple):
    """One row of a file: `where` names the file and the row, for messages; `values` are its cells by column."""

    where: str
    values: dict[str, Any]


def is_file(path: Path) -> bool:
    """`path.is_file()`. Raises NekoLeanError where the system does not even let us look."""
    try:
        return path.is_file()
    except OSError as error:  # a folder on the way that may not be searched, or a name that is too long
        raise NekoLeanError(f"{path} cannot be read ({error.strerror}).") from error


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark.

    Raises NekoLeanError for a file that cannot be read, or that is UTF-16 or otherwise not UTF-8; NUL bytes count as
    such, since UTF-16 without a byte-order mark is full of them.
    """
    kind = f"{file} is not a readable {file.suffix.lower().removeprefix('.') or 'text'} file"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise NekoLeanError(f"{kind} ({error.strerror}).") from error
    if data.startswith(_UTF16):
        raise NekoLeanError(f"{kind}: it is UTF-16 or UTF-32 text, expected UTF-8; save it as UTF-8.")

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        at = f"byte 0x{data[error.start]:02x} in line {line}"
        raise NekoLeanError(f"{kind}: {at} is not UTF-8; save it as UTF-8.") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise NekoLeanError(f"{kind}: line {line} holds a NUL byte, expected UTF-8 text; save it as UTF-8.")
    return text


def read_jsonl(file: Path, *, lone_surrogates: bool = False) -> Iterator[Record]:
    """The objects of a JSON Lines file; empty lines are skipped. `lone_surrogates` lets those pass.

    Raises NekoLeanError naming the line that is not a JSON object, names a key twice (at any depth), is nested too
    deep, holds an integer that is too long, or holds half of a surrogate pair, which is no text in any encoding.
    """
    number = 0
    # Universal newlines only: str.splitlines would also split at U+2028, which a JSON string may hold.
    for line_number, line in enumerate(io.StringIO(read_text(file), newline=None), start=1):
        line = line.removeprefix("\ufeff")  # files that were joined have a byte-order mark in the middle
        if not line.strip():
            continue
        number += 1
        where = f"{file}, row {number} (line {line_number})"
        values = _json_object(line, where)
        if not lone_surrogates and "\\u" in line:  # UTF-8 holds none: only an escape can spell half of a pair
            _refuse_lone_surrogates(values, where)
        yield Record(f"{file}, row {number}" + (f" (line {line_number})" if line_number != number else ""), values)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line, object_pairs_hook=_unique_keys)
        if not isinstance(values, dict):
            raise NekoLeanError(f"{where}: is not a JSON object.")
    except _DuplicateKeyError as error:
        raise NekoLeanError(
            f"{where}: key '{_shown(error.args[0])}' occurs twice in one object; remove one."
        ) from error
    except json.JSONDecodeError as error:
        raise NekoLeanError(f"{where}: is not JSON ({error.msg}).") from error
    except RecursionError as error:
        raise NekoLeanError(f"{where}: is nested too deep; expected an object of texts.") from error
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise NekoLeanError(f"{where}: holds a number that is too long ({first_line(error)}).") from error
    return values


class _DuplicateKeyError(ValueError):
    """A JSON object names a key twice; the argument is the key."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKeyError(key)
        values[key] = value
    return values


def _refuse_lone_surrogates(values: dict[str, Any], where: str) -> None:
    for column, value in values.items():
        pending = [column, value]
        while pending:  # no recursion: what json.loads can nest, a function of ours may not be able to
            one = pending.pop()
            if isinstance(one, dict):
                pending += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                pending += one
            elif isinstance(one, str) and (found := _SURROGATE.search(one)):
                raise NekoLeanError(
                    f"{where}, column '{_shown(column)}': holds {found[0]!a}, half of a surrogate pair, which is no "
                    f"text; write the whole character."
                )


def read_csv(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """The rows of a CSV file whose first row names the columns, `columns` among them; empty lines are skipped.

    Raises NekoLeanError naming row and line for a row with more or fewer cells than the header, a quote that is not
    closed or not doubled, and a header that lacks a column, names one twice or is not separated by commas.
    """
    rows = csv_cells(file, strict=True)
    _, header = next(rows, (0, None))
    if header is None:
        return
    _check_header(header, columns, f"{file}, header")

    for number, (line, cells) in enumerate(rows, start=1):
        where = f"{file}, row {number} (line {line})"
        if len(cells) < len(header):
            raise NekoLeanError(
                f"{where}, column {_shown(header[len(cells)])}: is missing, since the row has {len(cells)} cells and "
                f"the header {len(header)}; write every cell, also empty ones."
            )
        if len(cells) > len(header):
            raise NekoLeanError(
                f"{where}: has {len(cells)} cells and the header only {len(header)}, so that text after column "
                f"{_shown(header[-1])} would be lost; put cells that contain a comma in double quotes."
            )
        yield Record(where, dict(zip(header, cells, strict=True)))


def csv_cells(file: Path, *, strict: bool) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row of a CSV file that is not empty, with the line that the row begins in, from 1.

    Cells may be of any length. With `strict`, quotes that are not closed or not doubled raise NekoLeanError.
    """
    text = read_text(file)
    reader = csv.reader(io.StringIO(text, newline=""), strict=strict)
    limit = csv.field_size_limit()
    number = line = 0
    try:
        while True:
            line = reader.line_num + 1
            # The limit is the process's own: it holds for each row alone, so that nobody else sees another.
            csv.field_size_limit(max(limit, len(text)))
            try:
                cells = next(reader)
            finally:
                csv.field_size_limit(limit)
            if cells:
                yield line, cells
                number += 1
    except StopIteration:
        return
    except csv.Error as error:
        where = f"{file}, row {number} (line {line})" if number else f"{file}, line {line}"
        raise NekoLeanError(
            f"{where}: is not CSV ({first_line(error)}); close each quoted cell, and double the quotes inside it."
        ) from error


def _check_header(header: list[str], columns: Sequence[str], where: str) -> None:
    for separator, name in _SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise NekoLeanError(f"{where}: its columns are separated by {name}, expected commas.")
    _refuse_duplicates(header, where)
    for column in columns:
        if column not in header:
            # Only names that were meant are quoted: what stands in the place of a missing header is a row.
            close = [f"'{_shown(name)}'" for name in header if name.strip().lower() == column]
            found = f"; found {close[0]}" if close else ""
            raise NekoLeanError(f"{where}: column {column} is missing (needed: {', '.join(columns)}{found}).")


def read_parquet(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """The rows of a parquet file: those of `columns` that it has, as Python values.

    Raises NekoLeanError naming row and column for a value that cannot be read, such as text that is not UTF-8, and for
    a file that is not parquet or names a column twice.
    """
    import pyarrow.parquet

    try:
        # One file, read as it is: a folder called split=x must not turn into a column.
        with pyarrow.parquet.ParquetFile(file) as source:
            names = list(source.schema_arrow.names)
            _refuse_duplicates(names, str(file))
            found = [name for name in columns if name in names]
            table = source.read(columns=found)
            count = table.num_rows if found else source.metadata.num_rows
    except NekoLeanError:
        raise
    except Exception as error:  # damaged files raise pyarrow's own errors, OSError, UnicodeDecodeError and others
        raise NekoLeanError(f"{file} is not a readable parquet file ({first_line(error)}).") from error

    cells = {name: _parquet_values(table.column(name), f"{file}, row", name) for name in found}
    for number in range(count):
        yield Record(f"{file}, row {number + 1}", {name: cells[name][number] for name in found})


def _parquet_values(column: Any, where: str, name: str) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
        return values
    except Exception as error:  # some value is not UTF-8, or a time that Python cannot hold: find it
        number, cause = _first_unreadable(column) or (1, error)
        reason = "is not UTF-8 text" if isinstance(cause, UnicodeDecodeError) else "cannot be read"
        raise NekoLeanError(f"{where} {number}, column {name}: {reason} ({first_line(cause)}).") from error


def _first_unreadable(column: Any) -> tuple[int, Exception] | None:
    """The first row whose value cannot become a Python value, counted from 1, and why."""
    for number, value in enumerate(column, start=1):
        try:
            value.as_py()
        except Exception as error:
            return number, error
    return None


def _refuse_duplicates(names: Sequence[str], where: str) -> None:
    """Columns without a name, as spreadsheets add them at the end, may be several: nothing reads them."""
    for number, name in enumerate(names):
        if name and name in names[:number]:
            raise NekoLeanError(f"{where}: column '{_shown(name)}' occurs twice; rename or remove one.")


def _shown(name: str) -> str:
    """A column's name for a message: a file that is no table may have a whole page in its place."""
    short = name if len(name) <= 40 else f"{name[:40]}..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in short)
