"""Read single values from scores that may be older, partial or damaged.

Nothing here raises: a value that is missing or has another type is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_VALUE = 1e15  # no measured number comes near it
Interval = tuple[float, float]


def value_at(tree: Any, *path: str) -> Any:
    """The value at a path of keys in nested objects, or None."""
    for key in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def number(tree: Any, *path: str) -> float | None:
    """The number at a path of keys, or None.

    JSON as Python reads it may hold NaN, infinities and integers of any size; those are None, too.
    """
    value = value_at(tree, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST_VALUE else None


def interval(tree: Any, *path: str) -> Interval | None:
    """The interval [low, high] at a path of keys, or None."""
    ends = value_at(tree, *path)
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = (number({"end": end}, "end") for end in ends)
    return None if low is None or high is None else (min(low, high), max(low, high))


def mean(values: Mapping[str, float]) -> float | None:
    """The mean of the values, or None if there are none."""
    return sum(values.values()) / len(values) if values else None


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of one or more values; 0 if any of them is 0 or negative."""
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def percent(share: float) -> str:
    """Format a share as a percentage, without rounding a small one to zero."""
    return "less than 1 %" if 0 < share <= 0.005 else f"{100 * share:.0f} %"  # 0.5 rounds to 0
