"""Read JSON Lines files strictly."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neko_lean.data.files import Record, read_text, shorten_name
from neko_lean.errors import NekoLeanError, first_line

SURROGATE = re.compile("[\ud800-\udfff]")  # only lone ones match: json.loads combines the two halves of a pair


def read_jsonl(file: Path, *, lone_surrogates: bool = False) -> Iterator[Record]:
    """Yield the objects of a JSON Lines file. Empty lines are skipped.

    Args:
        file: The file to read.
        lone_surrogates: Accept half of a surrogate pair in a string.

    Raises:
        NekoLeanError: If a line is not a JSON object, repeats a key (at any depth), is nested too deeply, contains an
            integer that Python refuses to parse, or contains half of a surrogate pair.
    """
    row = 0
    # Universal newlines only: str.splitlines would also split at U+2028, which a JSON string may contain.
    for line_number, line in enumerate(io.StringIO(read_text(file), newline=None), start=1):
        line = line.removeprefix("\ufeff")  # concatenated files have byte-order marks in the middle
        if not line.strip():
            continue

        row += 1
        where = f"{file}, row {row} (line {line_number})"
        values = parse_json(line, where)
        if not isinstance(values, dict):
            raise NekoLeanError(f"{where} is not a JSON object; write one object with named columns per line.")
        if not lone_surrogates and "\\u" in line:  # in UTF-8 text only an escape can represent half of a pair
            refuse_lone_surrogates(values, where)

        yield Record(where if line_number != row else f"{file}, row {row}", values)


class _DuplicateKeyError(ValueError):
    """A JSON object repeats a key, which is the error's argument."""


def parse_json(text: str, where: str) -> Any:
    """Parse JSON strictly.

    Raises:
        NekoLeanError: If the text is not JSON, an object in it repeats a key, it is nested too deeply, or it contains
            an integer that Python refuses to parse. Its cause is the json.JSONDecodeError if the text is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except _DuplicateKeyError as error:
        key = shorten_name(error.args[0])
        raise NekoLeanError(f"{where}: key '{key}' occurs twice in the same object; remove one.") from error
    except json.JSONDecodeError as error:
        raise NekoLeanError(f"{where} is not valid JSON ({error.msg}).") from error
    except RecursionError as error:
        raise NekoLeanError(f"{where} is nested too deep; expected an object of strings.") from error
    except ValueError as error:  # Python refuses integers with thousands of digits
        raise NekoLeanError(f"{where} contains a number that is too long ({first_line(error)}).") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKeyError(key)
        values[key] = value
    return values


def refuse_lone_surrogates(values: dict[str, Any], where: str) -> None:
    """Raise NekoLeanError if a string anywhere in a row contains half of a surrogate pair."""
    for column, value in values.items():
        # Not recursive: json.loads accepts deeper nesting than a Python function does.
        pending = [column, value]
        while pending:
            node = pending.pop()
            if isinstance(node, dict):
                pending += [*node.keys(), *node.values()]
            elif isinstance(node, list):
                pending += node
            elif isinstance(node, str) and (surrogate := SURROGATE.search(node)):
                raise NekoLeanError(
                    f"{where}: column '{shorten_name(column)}' contains {surrogate[0]!a}, half of a surrogate pair, "
                    f"which is not valid text; write the whole character."
                )
