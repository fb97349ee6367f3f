"""Read the examples of a data set: from a file, a folder, Python objects or the Hugging Face hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neko_lean.data.columns import Layout, known_columns, parse_columns, recognise
from neko_lean.data.example_types import COLUMNS, LUME_ID, TASKS, EncodedExample, Example, Kind, Message
from neko_lean.data.files import Record
from neko_lean.data.hub import load_hub_rows, parse_hub_name
from neko_lean.data.python_rows import read_python_rows
from neko_lean.data.rows import build_examples
from neko_lean.data.sources import SUFFIXES, describe_unread, find_data_file, read_path
from neko_lean.errors import NekoLeanError

__all__ = [
    "COLUMNS",
    "LUME_ID",
    "SUFFIXES",
    "TASKS",
    "EncodedExample",
    "Example",
    "Kind",
    "Message",
    "RowSource",
    "Rows",
    "count_lost_answers",
    "describe_rows",
    "find_data_file",
    "paths_among",
    "read_rows",
    "refuse_unused_split",
    "require_folder",
]

# Rows of a data set: a path, the name of a data set on the hub, a list of dicts, a DataFrame or a Dataset.
RowSource = str | Path | Iterable[Any]

_MAX_GROUPS = 5  # how many groups `describe_rows` names


class Rows(list[Example]):
    """The examples of a data set, in its order.

    Attributes:
        layout: The name of the layout that was recognised, such as "question/answer".
        unread: What is next to the texts of a folder and was not read, as a clause for a message.
    """

    def __init__(self, examples: Iterable[Example], layout: str, unread: str = "") -> None:
        super().__init__(examples)
        self.layout = layout
        self.unread = unread


def read_rows(
    path: RowSource,
    stem: str = "",
    split: str | None = None,
    *,
    columns: str | Mapping[str, str] | None = None,
) -> Rows:
    """Read and validate the examples of a data set.

    Args:
        path: A parquet, jsonl, json, csv, tsv, txt or md file; a folder that contains one, or that contains text files;
            a list of dicts, a pandas DataFrame or a `datasets.Dataset`; or a data set on the Hugging Face hub, as
            "owner/name[:config][/split]".
        stem: The name of the file in a folder, without suffix, such as "forget".
        split: In a folder, read `<stem>_<split>` instead of `<stem>`.
        columns: Which column holds what, for names that are not recognised: a column's name for some of the keys
            "prompt", "answer", "text", "messages", "id", "group", "kind" and "document". As a string, it is written as
            for `parse_columns`.

    Returns:
        The examples in the order of the data set. `describe_rows` states in a sentence what was recognised.

    Raises:
        NekoLeanError: If the data set does not exist or contains no rows, its columns are not recognised, a value is
            empty or has the wrong type, or an id occurs twice. The message names the file, the row (counted from 1,
            without a CSV header) and the column.

    Example:
        >>> read_rows([{"id": 7, "question": "Who sang?", "answer": "Foo."}])
        [Example(id='7', input='Who sang?', output='Foo.', task='all', kind='qa', document='7', messages=())]
    """
    columns = parse_columns(columns) if isinstance(columns, str) else columns
    records, name = _read_records(path, stem, split, columns)
    if not records:
        raise NekoLeanError(f"{name} contains no rows; expected at least one.")

    layout = recognise(records, columns)
    examples = build_examples(records, layout)
    return Rows(examples, _layout_name(layout, examples), "" if split else describe_unread(path, stem))


def describe_rows(examples: Sequence[Example], source: object) -> str:
    """A sentence that states what was read, such as "forget.json: 400 rows, question/answer -> 400 qa; group 'all'."

    Args:
        examples: The result of `read_rows`.
        source: Where the examples come from, for the start of the sentence. Of a path, only the name is used.
    """
    if isinstance(source, Path) or (isinstance(source, str) and Path(source).exists()):
        source = Path(source).name
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(example.kind for example in examples).items())
    layout = getattr(examples, "layout", "")
    groups = Counter(example.task for example in examples)
    named = [repr(group) if len(groups) == 1 else f"{group!r} ({count})" for group, count in groups.items()]
    if len(named) > _MAX_GROUPS:
        named = [*named[:_MAX_GROUPS], f"{len(named) - _MAX_GROUPS} more"]

    rows = "1 row" if len(examples) == 1 else f"{len(examples)} rows"
    read_as = f"{layout} -> {kinds}" if layout else kinds
    what = source if isinstance(source, str) else "data"
    unread = f"; {examples.unread}" if isinstance(examples, Rows) and examples.unread else ""
    return f"{what}: {rows}, {read_as}; {'group' if len(groups) == 1 else 'groups'} {', '.join(named)}{unread}."


def paths_among(*sources: object) -> list[str | Path | None]:
    """Those of the sources of models and data that are paths or names, as opposed to Python objects."""
    return [source for source in sources if isinstance(source, (str, Path))]


def refuse_unused_split(split: str | None, *sources: RowSource | None) -> None:
    """Raise NekoLeanError if a split is given, but no source is a folder or a data set on the hub."""
    given = [source for source in sources if source is not None]
    named = [source for source in given if isinstance(source, (str, Path)) and not Path(source).is_file()]
    if split is not None and not named:
        what = f"{given[0]} is a file" if isinstance(given[0], (str, Path)) else "the rows are given as Python objects"
        raise NekoLeanError(f"--split {split} has no effect, because {what}; leave it out, or name the folder.")


def require_folder(data: RowSource, option: str, sets: Sequence[str], split: str | None) -> None:
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
    if not isinstance(data, (str, Path)):
        raise NekoLeanError(f"{option} must be a path, got {type(data).__name__}; expected a folder with the sets.")
    if Path(data).is_file() and (len(sets) > 1 or split is not None):
        names = " and ".join(f"{stem}.*" if split is None else f"{stem}_{split}.*" for stem in sets)
        raise NekoLeanError(f"{option} {data} is a file; expected a folder with {names}.")


def count_lost_answers(encoded: Sequence[EncodedExample]) -> int:
    """The number of examples whose answer the length limit removed entirely."""
    return sum(example.answer_length == 0 for example in encoded)


def _read_records(
    source: RowSource, stem: str, split: str | None, columns: Mapping[str, str] | None
) -> tuple[list[Record], str]:
    """The rows of a data set, and what to call it in a message."""
    if not isinstance(source, (str, Path)):
        return list(read_python_rows(source)), "the data"

    hub = parse_hub_name(source)
    if hub is None:
        return read_path(Path(source), stem, split, known_columns(columns))
    rows = read_python_rows(load_hub_rows(hub, stem, split))
    return [Record(f"{source}, {where}", values) for where, values in rows], str(source)


def _layout_name(layout: Layout, examples: Sequence[Example]) -> str:
    lume = layout.lume and all(example.task in TASKS and LUME_ID.match(example.id) for example in examples)
    return "LUME" if lume else layout.name
