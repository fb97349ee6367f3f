"""Read and write JSON strictly: UTF-8, and no NaN or infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from neko_lean.errors import NekoLeanError


def json_object(file: Path) -> dict[str, Any] | None:
    """Read the JSON object in a file.

    Returns:
        The object, or None if the file contains anything else.

    Raises:
        OSError: If the file cannot be read.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_jsonl(file: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Write objects as a JSON Lines file."""
    file.write_text(jsonl_text(objects), encoding="utf-8")


def jsonl_text(objects: Iterable[Mapping[str, Any]]) -> str:
    """The text of a JSON Lines file with these objects."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in objects)


def strict_json(value: Any, file_name: str, indent: int | None = None) -> str:
    """Serialize results as JSON.

    Args:
        value: The results, as nested mappings, lists and numbers.
        file_name: The file that the JSON is for, for the error message.
        indent: As for `json.dumps`.

    Raises:
        NekoLeanError: If a number is NaN or infinite. The message names the first one.
    """
    for path, number in _floats(value):
        if not math.isfinite(number):
            raise NekoLeanError(
                f"{path} in {file_name} would be {number}, which is not a valid result; run with --dtype float32, or "
                f"use a checkpoint whose training did not diverge."
            )
    return json.dumps(value, indent=indent, allow_nan=False)


def nan_to_null(value: Any) -> Any:
    """Replace every NaN and infinity in nested mappings and lists by None, for JSON that is only informative."""
    if isinstance(value, Mapping):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _floats(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every float in nested mappings and lists, with its path, such as "task.scores[2]"."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _floats(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _floats(item, f"{path}[{index}]")
    elif isinstance(value, float):
        yield path, value
