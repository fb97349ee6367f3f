"""What all data file readers share: the record type, decoding text, and checking column names.

The readers are strict. They return a record unchanged or raise a one-sentence error that names the file, the row and
the column. They never skip a bad record, and never pick one of two values for the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neko_lean.errors import NekoLeanError

_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks of UTF-16; UTF-32 little-endian starts with the first one too

_MAX_NAME_LENGTH = 40  # characters of a column name in a message


class Record(NamedTuple):
    """One row of a data file.

    Attributes:
        where: The file and the row, such as "forget.csv, row 3 (line 5)", for error messages.
        values: The row's cells by column name.
    """

    where: str
    values: dict[str, Any]


def is_file(path: Path) -> bool:
    """`path.is_file()`, with a NekoLeanError if the operating system does not allow the check."""
    try:
        return path.is_file()
    except OSError as error:  # a parent folder without search permission, or a name that is too long
        raise NekoLeanError(f"{path} cannot be read ({error.strerror}).") from error


def read_text(file: Path) -> str:
    """Read a UTF-8 file and remove its byte-order mark, if it has one.

    Raises:
        NekoLeanError: If the file cannot be read, is not UTF-8, or contains a NUL byte. UTF-16 without a byte-order
            mark is often valid UTF-8, but it is full of NUL bytes.
    """
    problem = f"{file} is not a readable {file.suffix.lower().removeprefix('.') or 'text'} file"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise NekoLeanError(f"{problem} ({error.strerror}).") from error
    if data.startswith(_UTF16):
        raise NekoLeanError(f"{problem}: it is UTF-16 or UTF-32 text; save it as UTF-8.")

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x} in line {line}"
        raise NekoLeanError(f"{problem}: {byte} is not UTF-8; save the file as UTF-8.") from error

    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise NekoLeanError(f"{problem}: line {line} contains a NUL byte; save the file as UTF-8 text.")
    return text


def refuse_duplicate_columns(names: Sequence[str], where: str) -> None:
    """Raise NekoLeanError if a column name occurs twice.

    Columns without a name may occur several times. Spreadsheets append them, and no reader uses them.
    """
    for index, name in enumerate(names):
        if name and name in names[:index]:
            raise NekoLeanError(f"{where}: column '{shorten_name(name)}' occurs twice; rename or remove one.")


def shorten_name(name: str) -> str:
    """A column name for an error message: at most 40 characters, with non-printable ones escaped.

    If a file is not a table, the text in place of its header can be arbitrarily long.
    """
    short = name if len(name) <= _MAX_NAME_LENGTH else f"{name[:_MAX_NAME_LENGTH]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in short)
