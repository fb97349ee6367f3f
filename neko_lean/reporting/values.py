"""Read values from files that may be older, partial or damaged, and format numbers for the page.

Nothing here raises, so that the page is written whatever scores.json lacks: a value that is missing or has another type
is None or empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neko_lean.scoring import Interval, number, value_at

NOT_MEASURED = "not measured"


def text(tree: Any, *path: str) -> str:
    """The string at a path of keys, or an empty one."""
    value = value_at(tree, *path)
    return value if isinstance(value, str) else ""


def mapping(tree: Any, *path: str) -> dict[str, Any]:
    """The object at a path of keys, or an empty one."""
    value = value_at(tree, *path)
    return value if isinstance(value, dict) else {}


def objects(tree: Any, *path: str) -> list[dict[str, Any]]:
    """The objects in the list at a path of keys."""
    value = value_at(tree, *path)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers(tree: Any, *path: str) -> list[float]:
    """The finite numbers in the list at a path of keys."""
    value = value_at(tree, *path)
    values = [number({"item": item}, "item") for item in value] if isinstance(value, list) else []
    return [value for value in values if value is not None]


def strings(tree: Any, *path: str) -> list[str]:
    """The strings in the list at a path of keys."""
    value = value_at(tree, *path)
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None without values."""
    return sum(values) / len(values) if values else None


def join_words(words: Sequence[str]) -> str:
    """A list in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def format_number(value: float | None, missing: str = NOT_MEASURED) -> str:
    """Format a number with three decimals, or one if it is large, and a true minus sign."""
    if value is None:
        return missing
    decimals = 3 if abs(value) < 100 else 1
    return f"{value:.{decimals}f}".replace("-", "−")  # noqa: RUF001 (the minus sign is intended)


def format_change(value: float) -> str:
    """Format a number with its sign."""
    return ("+" if value > 0 else "") + format_number(value)


def format_interval(ends: Interval | None) -> str:
    """Format an interval as '0.51 to 0.82'; empty without an interval."""
    return "" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}".replace("-", "−")  # noqa: RUF001


def format_bytes(value: float) -> str:
    """Format a number of bytes in GiB."""
    return f"{value / 2**30:.2f} GiB"


def format_duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
