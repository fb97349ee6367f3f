"""Read text files: each file is one document, and its name is the document's id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from neko_lean.data.files import Record, read_text
from neko_lean.errors import NekoLeanError

TEXT_SUFFIXES = (".txt", ".md")


def read_text_document(file: Path) -> Iterator[Record]:
    """Yield the only row of a text file, with the columns `id` (the file's name) and `text`.

    Raises:
        NekoLeanError: If the file cannot be read, is not UTF-8 text, or is blank.
    """
    text = read_text(file)
    if not text.strip():
        raise NekoLeanError(f"{file} contains no text; remove it or write the document into it.")
    yield Record(str(file), {"id": file.name, "text": text})


def text_files(folder: Path) -> list[Path]:
    """The text files in a folder, sorted by name. Subfolders and hidden files are not read.

    Raises:
        NekoLeanError: If the folder cannot be read.
    """
    try:
        files = [file for file in folder.iterdir() if file.suffix.lower() in TEXT_SUFFIXES and file.is_file()]
    except OSError as error:
        raise NekoLeanError(f"{folder} cannot be read ({error.strerror}).") from error
    return sorted(file for file in files if not file.name.startswith("."))


def other_files(folder: Path) -> list[str]:
    """The names of what else is in a folder of texts and is not read, sorted; a subfolder's name ends with a slash.
    Hidden files are not listed."""
    read = text_files(folder)
    others = [path for path in folder.iterdir() if path not in read and not path.name.startswith(".")]
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in others)


def read_text_folder(folder: Path) -> Iterator[Record]:
    """Yield one row per text file of a folder, with the columns `id` and `text`.

    Raises:
        NekoLeanError: If a file cannot be read, is not UTF-8 text, or is blank.
    """
    for file in text_files(folder):
        yield from read_text_document(file)
