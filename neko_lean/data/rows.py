"""Turn the rows of a data set into examples, according to its layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from neko_lean.data.columns import Layout
from neko_lean.data.conversations import parse_messages, prompt_text, split_answer
from neko_lean.data.example_types import LUME_ID, Example, Kind, Message
from neko_lean.data.files import Record, shorten_name
from neko_lean.data.jsonl_files import SURROGATE
from neko_lean.errors import NekoLeanError

DEFAULT_GROUP = "all"  # the group of rows that name none

_PAIR_KINDS: tuple[Kind, ...] = ("completion", "qa")

_MAX_INTEGER = 2**64  # larger ids are not integers that a data set wrote


def build_examples(records: Sequence[Record], layout: Layout) -> list[Example]:
    """Validate rows and turn them into examples.

    Args:
        records: The rows.
        layout: Their layout.

    Raises:
        NekoLeanError: If a row lacks a column, a value is empty or has a wrong type, or an id occurs twice. The message
            names the row and the column, and quotes no value except an id.
    """
    examples = []
    row_of_id: dict[str, int] = {}
    copies: dict[str, int] = {}

    for number, record in enumerate(records, start=1):
        example = _example(record, layout)
        if layout.id and record.values.get(layout.id) is not None:
            if example.id in row_of_id:
                raise NekoLeanError(
                    f"{record.where}: column '{layout.id}' repeats {example.id!r} of row {row_of_id[example.id]}; "
                    f"every row needs its own id."
                )
        else:
            example = _with_own_id(example, row_of_id, copies)
        row_of_id[example.id] = number
        examples.append(example)
    return examples


def _example(record: Record, layout: Layout) -> Example:
    """The example of a row. Without an id column, its id is a hash of its content, which copies of the row share."""
    if layout.stated and record.values.get("kind") is not None:
        return _stated_example(record)
    prompt, answer, messages = _content(record, layout)
    group = _optional_label(record, layout.group) or DEFAULT_GROUP
    if layout.lume and not _optional_label(record, layout.group):
        raise NekoLeanError(f"{record.where}: column 'task' is empty; every row needs a non-empty task.")

    row_id = _optional_label(record, layout.id)
    if layout.id and not row_id and (layout.lume or record.values.get(layout.id) is not None):
        raise NekoLeanError(f"{record.where}: column '{layout.id}' is empty; every row needs a non-empty id.")
    if layout.lume and LUME_ID.match(row_id):
        return Example(row_id, prompt, answer, group)  # the id states kind and document

    kind = _kind(record, layout, prompt, messages)
    row_id = row_id or _content_id(kind, prompt, answer)
    document = _optional_label(record, layout.document) or row_id
    return Example(row_id, prompt, answer, group, kind, document, messages)


def _stated_example(record: Record) -> Example:
    """The example of a row that `Example.row` wrote, which states everything."""
    row_id, task, document = (_text(record, column) for column in ("id", "task", "document"))
    kind = next((kind for kind in get_args(Kind) if record.values["kind"] == kind), None)
    if kind is None:
        raise NekoLeanError(f"{_at(record, 'kind')} must be {' or '.join(get_args(Kind))}.")

    prompt = "" if kind == "document" and record.values["input"] == "" else _text(record, "input")
    messages: tuple[Message, ...] = ()
    if record.values.get("messages"):
        messages = parse_messages(*_cell(record, "messages"))
    return Example(row_id, prompt, _text(record, "output"), task, kind, document, messages)


def _content(record: Record, layout: Layout) -> tuple[str, str, tuple[Message, ...]]:
    """The prompt, the answer and the messages before the answer."""
    if layout.text:
        return "", _text(record, layout.text), ()
    if layout.messages:
        return _conversation(record, layout.messages, parse_messages(*_cell(record, layout.messages)))

    if layout.conversational and isinstance(record.values.get(layout.prompt), list):
        messages = parse_messages(*_cell(record, layout.prompt))
        answer, where = _cell(record, layout.answer)
        if isinstance(answer, list):
            return _conversation(record, layout.answer, messages + parse_messages(answer, where))
        return _conversation(record, layout.prompt, (*messages, Message("assistant", _text(record, layout.answer))))

    prompt, answer = _text(record, layout.prompt), _text(record, layout.answer)
    if layout.context and record.values.get(layout.context) not in (None, ""):
        context = _string(record, layout.context)
        prompt = f"{prompt}\n\n{context}" if context.strip() else prompt
    return prompt, answer, ()


def _conversation(record: Record, column: str, messages: tuple[Message, ...]) -> tuple[str, str, tuple[Message, ...]]:
    where = _at(record, column)
    for message in messages:
        _check_characters(message.content, where)
    before, answer = split_answer(messages, where)
    return prompt_text(before), answer, before


def _kind(record: Record, layout: Layout, prompt: str, messages: tuple[Message, ...]) -> Kind:
    default = layout.kind or ("qa" if messages or prompt.rstrip().endswith("?") else "completion")
    if not layout.kind_column or record.values.get(layout.kind_column) in (None, ""):
        return default

    allowed = _PAIR_KINDS if prompt else ("document",)
    value = record.values[layout.kind_column]
    for kind in allowed:
        if value == kind:
            return kind
    raise NekoLeanError(f"{_at(record, layout.kind_column)} must be {' or '.join(allowed)}.")


def _with_own_id(example: Example, row_of_id: dict[str, int], copies: dict[str, int]) -> Example:
    """The example with "-2", "-3" and so on after an id that is taken. Copies keep sharing their document."""
    row_id = example.id
    while row_id in row_of_id:
        copies[example.id] = copies.get(example.id, 1) + 1
        row_id = f"{example.id}-{copies[example.id]}"
    if row_id == example.id:
        return example
    return replace(example, id=row_id)


def _content_id(kind: Kind, prompt: str, answer: str) -> str:
    text = json.dumps([kind, prompt, answer], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _at(record: Record, column: str) -> str:
    return f"{record.where}: column '{shorten_name(column)}'"


def _cell(record: Record, column: str) -> tuple[Any, str]:
    """The value of a required column, and where it is."""
    where = _at(record, column)
    if column not in record.values:
        raise NekoLeanError(f"{where} is missing; every row needs it.")
    return record.values[column], where


def _text(record: Record, column: str) -> str:
    """The string in a required column, which must not be blank."""
    _cell(record, column)
    text = _string(record, column)
    if not text.strip():
        raise NekoLeanError(f"{_at(record, column)} is empty; every row needs a non-empty {shorten_name(column)}.")
    return text


def _string(record: Record, column: str) -> str:
    value = record.values[column]
    if isinstance(value, list):
        raise NekoLeanError(f"{_at(record, column)} contains a list; expected one string, so write one row per item.")
    if not isinstance(value, str):
        raise NekoLeanError(
            f"{_at(record, column)} contains a value of type {type(value).__name__}; expected a string."
        )
    _check_characters(value, _at(record, column))
    return value


def _optional_label(record: Record, column: str) -> str:
    """The string or the integer in an optional column as a string, or "" if it is null or blank."""
    value = record.values.get(column) if column else None
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # pandas turns a column of integers with a gap into floats
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_INTEGER:
        return str(value)
    if not isinstance(value, str):
        raise NekoLeanError(
            f"{_at(record, column)} contains a value of type {type(value).__name__}; expected a string or an integer."
        )
    _check_characters(value, _at(record, column))
    return value if value.strip() else ""


def _check_characters(text: str, where: str) -> None:
    if not text.isascii() and SURROGATE.search(text):
        raise NekoLeanError(f"{where} contains half of a surrogate pair, which is not valid text; write the character.")
