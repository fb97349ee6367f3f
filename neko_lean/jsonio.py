"""JSON as neko-lean reads and writes it: strict, UTF-8, without NaN."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    pass
import math


def json_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where it holds something else. Raises OSError where it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_jsonl(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write objects as JSON Lines."""
    file.write_text(jsonl_text(lines), encoding="utf-8")


def jsonl_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """Objects as the text of a JSON Lines file."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def strict_json(value: Any, what: str, indent: int | None = None) -> str:
    """`value` as JSON. Raises NekoLeanError naming the first key of `what` whose number is NaN or infinite."""
    for path, number in _numbers(value):
        if not math.isfinite(number):
            raise NekoLeanError(
                f"{what} would say {number} for {path}: no such number is a result, so run it in --dtype float32, or "
                f"give a checkpoint whose training did not diverge."
            )
    return json.dumps(value, indent=indent, allow_nan=False)


def nan_to_null(value: Any) -> Any:
    """`value` with None in the place of every number that is NaN or infinite, for JSON that only informs."""
    if isinstance(value, Mapping):
        return {key: nan_to_null(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every float in nested objects and lists, with the way there."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _numbers(one, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _numbers(one, f"{path}[{number}]")
    elif isinstance(value, float):
        yield path, value
