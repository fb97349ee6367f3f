"""Read JSON files strictly: a list of objects, an object that contains one list, or JSON Lines named .json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neko_lean.data.files import Record, read_text
from neko_lean.data.jsonl_files import parse_json, read_jsonl, refuse_lone_surrogates
from neko_lean.errors import NekoLeanError

_MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion")  # lists of objects that belong to one row


def read_json(file: Path) -> Iterator[Record]:
    """Yield the objects of a JSON file.

    Args:
        file: A list of objects, an object with one list of objects such as `{"data": [...]}`, a single row, or JSON
            Lines.

    Raises:
        NekoLeanError: If the file is none of these, a row is not an object, or a row is invalid as in `read_jsonl`.
    """
    text = read_text(file)
    if not text.strip():
        return

    try:
        value = parse_json(text, str(file))
    except NekoLeanError as error:
        # The first line of JSON Lines is a complete object, and the second line is extra data.
        cause = error.__cause__
        if not (isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data" and text.lstrip()[0] == "{"):
            raise
        yield from read_jsonl(file)
        return

    for number, row in enumerate(_rows(value, file), start=1):
        where = f"{file}, row {number}"
        if not isinstance(row, dict):
            raise NekoLeanError(f"{where} is not a JSON object; write one object with named columns per row.")
        if "\\u" in text:  # in UTF-8 text only an escape can represent half of a surrogate pair
            refuse_lone_surrogates(row, where)
        yield Record(where, row)


def _rows(value: Any, file: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise NekoLeanError(f"{file} contains no list of rows; write a JSON list of objects.")

    lists: list[list[Any]] = [
        item for key, item in value.items() if key not in _MESSAGE_COLUMNS and _is_list_of_objects(item)
    ]
    if len(lists) > 1:
        raise NekoLeanError(f"{file} contains {len(lists)} lists of rows; save each list in its own file.")
    if lists:
        return lists[0]
    return [] if list(value.values()) == [[]] else [value]


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
