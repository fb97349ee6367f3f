"""Examples, and reading them from data files.

An example has the columns `id, input, output, task`, as in LUME (arXiv 2502.15097). The file's format is chosen by its
suffix.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from neko_lean.data.csv_files import read_csv
from neko_lean.data.files import Record, is_file
from neko_lean.data.jsonl_files import read_jsonl
from neko_lean.data.parquet_files import read_parquet
from neko_lean.errors import NekoLeanError

COLUMNS = ("id", "input", "output", "task")

TASKS = ("Task1", "Task2", "Task3")

SUFFIXES = (".parquet", ".jsonl", ".csv")  # in order of preference if a folder contains several

LUME_ID = re.compile(r"^(?P<document>.+?)(?P<kind>sc|qa)\d+$", re.DOTALL)


Kind = Literal["completion", "qa", "document"]


class Message(NamedTuple):
    """One message of a conversation: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt and its answer.

    Attributes:
        id: Unique within a set.
        input: The prompt, before a prompt format is applied. Empty for a document.
        output: The answer, or the text of a document.
        task: The group that the example's scores are reported under, such as "Task1" or "biography".
        kind: "completion" (a text and its continuation), "qa" (a question or a request), or "document" (a whole text
            without a prompt). If it is not given, it follows from the id as LUME writes it: sc<N> is a completion and
            qa<N> is a question; any other id is a completion.
        document: Examples about the same document share it, and statistics resample them together. If it is not given,
            it is the id without LUME's sc<N> or qa<N>.
        messages: The conversation up to the answer, if the data states one; a chat template is applied to it.
    """

    id: str
    input: str
    output: str
    task: str
    kind: Kind = ""  # type: ignore[assignment]  # set in __post_init__
    document: str = ""
    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        match = LUME_ID.match(self.id)
        if not self.kind:
            object.__setattr__(self, "kind", "qa" if match and match["kind"] == "qa" else "completion")
        if not self.document:
            object.__setattr__(self, "document", match["document"] if match else self.id)

    @property
    def lume_row(self) -> dict[str, str]:
        """The example's columns in LUME's layout."""
        return {column: getattr(self, column) for column in COLUMNS}

    @property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of id, input and output. The teacher cache identifies an example by it."""
        parts = [self.id, self.input, self.output]
        text = json.dumps([*parts, self.messages] if self.messages else parts, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EncodedExample:
    """A tokenized example: `prompt_length` prompt tokens, then the answer's tokens.

    Attributes:
        example: The example that was tokenized.
        input_ids: The token ids of prompt and answer, after truncation.
        prompt_length: How many of `input_ids` belong to the prompt.
        num_truncated: How many tokens the length limit removed from the end.
        levels: For each token after the first, the loss in nats at which it counts as forgotten. Only set for
            objectives that use it.
        num_context: How many of the first tokens the previous window of the same text has predicted already.
        num_following: How many tokens of the text are in later windows.
    """

    example: Example
    input_ids: list[int]
    prompt_length: int
    num_truncated: int
    levels: tuple[float, ...] | None = None
    num_context: int = 0
    num_following: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def answer_length(self) -> int:
        """How many answer tokens the length limit left."""
        return max(0, len(self.input_ids) - self.prompt_length)


def read_rows(path: str | Path, stem: str = "", split: str | None = None) -> list[Example]:
    """Read and validate the examples of a data file.

    Args:
        path: A parquet, jsonl or csv file, or a folder that contains one.
        stem: The name of the file in a folder, without suffix, such as "forget".
        split: In a folder, read `<stem>_<split>` instead of `<stem>`.

    Returns:
        The examples in the order of the file.

    Raises:
        NekoLeanError: If there is no such file, it contains no rows, a column is missing, a value is empty or not a
            string, an id is invalid or occurs twice, or a task is unknown. The message names the file, the row
            (counted from 1, without a CSV header) and the column.

    Example:
        >>> import json, tempfile
        >>> row = {"id": "7qa0", "input": "Who sang?", "output": "Foo.", "task": "Task1"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "forget.jsonl").write_text(json.dumps(row))
        ...     read_rows(folder, "forget")
        [Example(id='7qa0', input='Who sang?', output='Foo.', task='Task1', kind='qa', document='7', messages=())]
    """
    file = find_data_file(path, stem, split)
    examples: list[Example] = []
    row_of_id: dict[str, int] = {}

    for number, record in enumerate(_read_records(file), start=1):
        example = _validate(record)
        if example.id in row_of_id:
            raise NekoLeanError(
                f"{record.where}: column 'id' repeats {example.id!r} of row {row_of_id[example.id]}; every row needs "
                f"its own id."
            )
        row_of_id[example.id] = number
        examples.append(example)

    if not examples:
        raise NekoLeanError(f"{file} contains no rows.")
    return examples


def find_data_file(path: str | Path, stem: str, split: str | None = None) -> Path:
    """The data file that `path` refers to: `path` itself, or in a folder `<stem>.*` (or `<stem>_<split>.*`).

    A folder may contain the same set in several formats. Parquet is preferred over jsonl, and jsonl over csv.

    Raises:
        NekoLeanError: If there is no such file.
    """
    path = Path(path)
    if is_file(path):
        return path
    if not path.is_dir():
        problem = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise NekoLeanError(f"{path} {problem}; expected a parquet, jsonl or csv file, or a folder with {stem}.*.")

    name = f"{stem}_{split}" if split else stem
    for suffix in SUFFIXES:
        # Datasets on the Hugging Face hub name a single parquet shard forget_train-00000-of-00001.parquet.
        for file in (path / f"{name}{suffix}", path / f"{name}-00000-of-00001{suffix}"):
            if is_file(file):
                return file
    raise NekoLeanError(f"{path} contains no {name}.parquet, {name}.jsonl or {name}.csv.")


def require_folder(data: str | Path, option: str, sets: Sequence[str], split: str | None) -> None:
    """Check that `data` is not a single file if several sets, or a split, are to be read from it.

    A file would be read for every set, regardless of its name and of `split`.

    Args:
        data: The value of the option.
        option: The option's name, for the message.
        sets: The sets to read, such as ("forget", "retain").
        split: The split to read, if any.

    Raises:
        NekoLeanError: If `data` is a file but must be a folder.
    """
    if Path(data).is_file() and (len(sets) > 1 or split is not None):
        names = " and ".join(f"{stem}.*" if split is None else f"{stem}_{split}.*" for stem in sets)
        raise NekoLeanError(f"{option} {data} is a file; expected a folder with {names}.")


def count_lost_answers(encoded: Sequence[EncodedExample]) -> int:
    """The number of examples whose answer the length limit removed entirely."""
    return sum(example.answer_length == 0 for example in encoded)


def _read_records(file: Path) -> Iterator[Record]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return read_parquet(file, COLUMNS)
    if suffix == ".jsonl":
        return read_jsonl(file)
    if suffix == ".csv":
        return read_csv(file, COLUMNS)
    raise NekoLeanError(f"{file} is neither .parquet nor .jsonl nor .csv; convert it to one of these formats.")


def _validate(record: Record) -> Example:
    where, values = record
    for column in COLUMNS:
        if column not in values:
            raise NekoLeanError(f"{where}: column '{column}' is missing; expected the columns {', '.join(COLUMNS)}.")
        value = values[column]
        # Messages do not quote values, which may be personal data.
        if not isinstance(value, str):
            raise NekoLeanError(
                f"{where}: column '{column}' contains a value of type {type(value).__name__}; expected a string."
            )
        if not value.strip():
            raise NekoLeanError(f"{where}: column '{column}' is empty; every row needs a non-empty {column}.")

    if LUME_ID.match(values["id"]) is None:
        raise NekoLeanError(f"{where}: column 'id' ends in neither sc<N> nor qa<N>; expected an id such as 7sc1.")
    if values["task"] not in TASKS:
        raise NekoLeanError(f"{where}: column 'task' must be one of {', '.join(TASKS)}.")
    return Example(*(values[column] for column in COLUMNS))
