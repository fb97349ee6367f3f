"""Rows, prompt formats, tokenising, and batches without padding waste.

A row is `id, input, output, task` as in LUME (arXiv 2502.15097). Everything that reads a data file goes through
`read_rows`, so a bad file always ends in one sentence that names the file, the row and the column.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    pass
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neko_lean.data.readers import Record, is_file, read_csv, read_jsonl, read_parquet


def refuse_one_file(data: str | Path, option: str, sets: Sequence[str], split: str | None) -> None:
    """Raise NekoLeanError where `data` is a file: it would be read for every set, whatever its name and `split`."""
    if Path(data).is_file() and (len(sets) > 1 or split is not None):
        raise NekoLeanError(
            f"{option} {data} is a file: give the folder that holds forget.* and retain.*"
            f"{' of the split' if split is not None else ''}."
        )


def count_lost_answers(encoded: Sequence[EncodedExample]) -> int:
    """Rows whose whole answer the length limit removed."""
    return sum(one.answer_length == 0 for one in encoded)


COLUMNS = ("id", "input", "output", "task")


TASKS = ("Task1", "Task2", "Task3")


SUFFIXES = (".parquet", ".jsonl", ".csv")  # in the order they are preferred when a folder holds several


_ID = re.compile(r"^(?P<document>.+?)(?P<kind>sc|qa)\d+$", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One prompt and its answer. `id` ends in sc<N> (sentence completion) or qa<N> (question answering)."""

    id: str
    input: str
    output: str
    task: str

    @property
    def kind(self) -> str:
        """'sc' or 'qa'."""
        return _split_id(self.id)[1]

    @property
    def document(self) -> str:
        """The id without its sc<N> or qa<N>: rows of one document share it."""
        return _split_id(self.id)[0]

    @property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over the row's text: what the teacher cache knows a row by."""
        text = json.dumps([self.id, self.input, self.output], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EncodedExample:
    """A tokenized example: its prompt tokens, then its answer tokens.

    Args:
        example: the example's text.
        input_ids: token ids, truncated to the length limit.
        prompt_length: number of prompt tokens among them.
        num_truncated: number of tokens that truncation removed.
        levels: the loss, in nats, at which each token except the first counts as forgotten; None unless an objective
            uses levels.
    """

    example: Example
    input_ids: list[int]
    prompt_length: int
    num_truncated: int
    levels: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def answer_length(self) -> int:
        """Number of answer tokens within the length limit."""
        return max(0, len(self.input_ids) - self.prompt_length)


def _split_id(row_id: str) -> tuple[str, str]:
    match = _ID.match(row_id)
    if match is None:
        raise NekoLeanError(f"id {row_id!r} ends in neither sc<N> nor qa<N>.")
    return match["document"], match["kind"]


def find_rows(path: str | Path, stem: str, split: str | None = None) -> Path:
    """The data file meant by `path`: the file itself, or in a folder `stem.*` (`stem_split*` when a split is named).

    Raises NekoLeanError when nothing fits. A folder with several formats of one set is read as parquet before jsonl
    before csv.
    """
    path = Path(path)
    if is_file(path):
        return path
    if not path.is_dir():
        missing = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise NekoLeanError(f"{path} {missing}: give a parquet, jsonl or csv file, or a folder with {stem}.*.")
    name = f"{stem}_{split}" if split else stem
    for suffix in SUFFIXES:
        # The hub's parquet shards are called forget_train-00000-of-00001.parquet.
        for found in (path / f"{name}{suffix}", path / f"{name}-00000-of-00001{suffix}"):
            if is_file(found):
                return found
    raise NekoLeanError(f"{path} holds no {name}.parquet, {name}.jsonl or {name}.csv.")


def read_rows(path: str | Path, stem: str = "", split: str | None = None) -> list[Example]:
    """Read and check the rows of a parquet, jsonl or csv file, or of `stem.*` in a folder.

    Raises NekoLeanError naming file, row (counted from 1, without a CSV file's header) and column when a column is
    missing, the file is empty, a value is no text, an id has an unknown suffix or occurs twice, an input or output is
    empty, or a task is unknown; and for all that `files` refuses, such as surplus cells.
    """
    file = find_rows(path, stem, split)
    rows: list[Example] = []
    seen: dict[str, int] = {}
    for number, record in enumerate(_records(file), start=1):
        row = _checked(record.values, record.where)
        if row.id in seen:
            raise NekoLeanError(f"{record.where}, column id: {row.id!r} is already the id of row {seen[row.id]}.")
        seen[row.id] = number
        rows.append(row)
    if not rows:
        raise NekoLeanError(f"{file} holds no rows.")
    return rows


def _checked(raw: dict[str, Any], where: str) -> Example:
    for column in COLUMNS:
        if column not in raw:
            raise NekoLeanError(f"{where}: column {column} is missing (needed: {', '.join(COLUMNS)}).")
        value = raw[column]
        if not isinstance(value, str):
            raise NekoLeanError(f"{where}, column {column}: expected text, found {type(value).__name__}.")
        if not value.strip():
            raise NekoLeanError(f"{where}, column {column}: is empty.")
    if _ID.match(raw["id"]) is None:
        raise NekoLeanError(f"{where}, column id: ends in neither sc<N> nor qa<N>.")
    if raw["task"] not in TASKS:
        raise NekoLeanError(f"{where}, column task: is not one of {', '.join(TASKS)}.")
    return Example(*(raw[column] for column in COLUMNS))


def _records(file: Path) -> Iterator[Record]:
    kind = file.suffix.lower()
    if kind == ".parquet":
        return read_parquet(file, COLUMNS)
    if kind == ".jsonl":
        return read_jsonl(file)
    if kind == ".csv":
        return read_csv(file, COLUMNS)
    raise NekoLeanError(f"{file} is neither .parquet nor .jsonl nor .csv.")
