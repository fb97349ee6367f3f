"""Find the file that a path refers to, and choose the reader for it by its suffix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from neko_lean.data.csv_files import read_csv
from neko_lean.data.files import Record, is_file, shorten_name
from neko_lean.data.json_files import read_json
from neko_lean.data.jsonl_files import read_jsonl
from neko_lean.data.parquet_files import read_parquet
from neko_lean.data.text_files import TEXT_SUFFIXES, other_files, read_text_document, read_text_folder, text_files
from neko_lean.errors import NekoLeanError

TABLE_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")

_MAX_LISTED = 6  # data files that an error names

SUFFIXES = (*TABLE_SUFFIXES, *TEXT_SUFFIXES)  # in order of preference if a folder contains several


def read_path(path: Path, stem: str, split: str | None, columns: Sequence[str]) -> tuple[list[Record], str]:
    """Read the rows of a file or a folder.

    Args:
        path: A data file, a folder with `<stem>.*`, or a folder of text files.
        stem: The name of the file in a folder, without suffix.
        split: In a folder, read `<stem>_<split>` instead of `<stem>`.
        columns: The columns to read from a parquet file.

    Returns:
        The rows, and the path that was read.

    Raises:
        NekoLeanError: If there is no such file, or it cannot be read.
    """
    if (
        not is_file(path)
        and path.is_dir()
        and not split
        and _find_in_folder(path, stem) is None
        and holds_only_texts(path)
    ):
        return list(read_text_folder(path)), str(path)
    file = find_data_file(path, stem, split)
    return list(read_file(file, columns)), str(file)


def read_file(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of a data file.

    Args:
        file: The file. Its suffix states its format.
        columns: The columns to read from a parquet file; other formats are read completely.

    Raises:
        NekoLeanError: If the format is unknown, or the file or a row is invalid.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return read_parquet(file, columns)
    if suffix == ".jsonl":
        return read_jsonl(file)
    if suffix == ".json":
        return read_json(file)
    if suffix == ".csv":
        return read_csv(file)
    if suffix == ".tsv":
        return read_csv(file, separator="\t")
    if suffix in TEXT_SUFFIXES:
        return read_text_document(file)
    raise NekoLeanError(f"{file} has an unknown format; convert it to one of {', '.join(SUFFIXES)}.")


def find_data_file(path: str | Path, stem: str, split: str | None = None) -> Path:
    """The data file that `path` refers to: `path` itself, or in a folder `<stem>.*` (or `<stem>_<split>.*`).

    A split of TOFU is found under TOFU's own names. A folder may contain the same set in several formats. The first one
    in `SUFFIXES` is used.

    Raises:
        NekoLeanError: If there is no such file.
    """
    path = Path(path)
    if is_file(path):
        return path
    if not path.is_dir():
        problem = "is neither a file nor a folder" if path.exists() else "does not exist"
        folder = f"a folder with {stem}.*" if stem else "a folder of texts"
        raise NekoLeanError(f"{path} {problem}; expected a data file ({', '.join(SUFFIXES)}), or {folder}.")

    name = f"{stem}_{split}" if split else stem
    file = _find_in_folder(path, name) or _find_in_folder(path, _tofu_name(stem, split or ""))
    if file is None:
        found = f"; it has {_listed(path)}" if _listed(path) else ""
        raise NekoLeanError(
            f"{path} contains no {name}.parquet, nor {name} with {', '.join(SUFFIXES[1:])}{found}: "
            f"{_advice(path, stem, split)}."
        )
    return file


def _data_files(folder: Path) -> list[str]:
    """The names of the data files in a folder."""
    return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in TABLE_SUFFIXES and is_file(file))


def _listed(folder: Path) -> str:
    names = [shorten_name(name) for name in _data_files(folder)]
    return ", ".join(names[:_MAX_LISTED]) + (
        f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    )


def _advice(folder: Path, stem: str, split: str | None) -> str:
    """How to choose a file, if a folder lacks the expected one."""
    splits = _splits(folder, stem) if stem else []
    if splits:
        return f"choose one with --split {' or --split '.join(splits)}"
    if split and _find_in_folder(folder, stem):
        return "leave --split out"
    return "name the file itself, or rename it"


def _splits(folder: Path, stem: str) -> list[str]:
    """The splits of a set that a folder has: train for forget_train.parquet, forget10 for TOFU's forget10.json."""
    names = {re.sub(r"-00000-of-\d{5}$", "", Path(name).stem) for name in _data_files(folder)}
    splits = {name.removeprefix(f"{stem}_") for name in names if name.startswith(f"{stem}_")} - {"perturbed"}
    percents = {int(name.removeprefix(stem)) for name in names if re.fullmatch(rf"{re.escape(stem)}\d\d", name)}
    if stem in ("forget", "retain"):
        splits |= {f"forget{percent if stem == 'forget' else 100 - percent:02}" for percent in percents}
    return sorted(splits)


def _tofu_name(stem: str, split: str) -> str:
    """The name of TOFU's file (arXiv 2401.06121): split forget10 is forget10 and retain90. "" for another split."""
    match = re.fullmatch(r"forget(\d\d)", split)
    if match is None:
        return ""
    return {"forget": split, "retain": f"retain{100 - int(match[1])}"}.get(stem, "")


def _find_in_folder(folder: Path, name: str) -> Path | None:
    if not name:
        return None
    for suffix in SUFFIXES:
        # Datasets on the Hugging Face hub name a single parquet shard forget_train-00000-of-00001.parquet.
        for file in (folder / f"{name}{suffix}", folder / f"{name}-00000-of-00001{suffix}"):
            if is_file(file):
                return file
    return None


def describe_unread(source: object, stem: str) -> str:
    """What is next to the texts of a folder and is not read, as a clause for a message; "" if there is nothing.

    Args:
        source: the data set, as for `read_rows`.
        stem: the name of the file that would be read in place of the texts.
    """
    if not isinstance(source, (str, Path)):
        return ""
    folder = Path(source)
    if not folder.is_dir() or _find_in_folder(folder, stem) is not None or not holds_only_texts(folder):
        return ""
    names = [shorten_name(name) for name in other_files(folder)]
    if not names:
        return ""
    listed = f"{', '.join(names[:_MAX_LISTED])}{' and others' if len(names) > _MAX_LISTED else ''}"
    return f"{len(names)} not read, because only .txt and .md files directly in the folder are: {listed}"


def holds_only_texts(folder: Path) -> bool:
    """Whether a folder contains text files and no table. A README beside other tables is not a data set."""
    return bool(text_files(folder)) and not any(file.suffix.lower() in TABLE_SUFFIXES for file in folder.iterdir())
