"""Read single values out of files that may be older, partial or wrong, and write numbers as the page shows them.

The page must come out whatever a scores.json lacks, so nothing here raises: what is not there, or is of another type,
is None or empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOT_MEASURED = "not measured"


LARGEST = 1e15  # nothing that is measured here comes near it


Interval = tuple[float, float]


def at(tree: Any, *path: str) -> Any:
    """What lies at `path` in nested objects; None where the way there breaks off."""
    for key in path:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def number(tree: Any, *path: str) -> float | None:
    """A number at `path`, else None: JSON as Python reads it may hold NaN, infinities and endless integers, none of
    which can be drawn."""
    value = at(tree, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None


def interval(tree: Any, *path: str) -> Interval | None:
    """[low, high] at `path`, else None."""
    ends = at(tree, *path)
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = number({"x": ends[0]}, "x"), number({"x": ends[1]}, "x")
    return None if low is None or high is None else (min(low, high), max(low, high))


def text(tree: Any, *path: str) -> str:
    """A string at `path`, else the empty one."""
    value = at(tree, *path)
    return value if isinstance(value, str) else ""


def mapping(tree: Any, *path: str) -> dict[str, Any]:
    """An object at `path`, else an empty one."""
    value = at(tree, *path)
    return value if isinstance(value, dict) else {}


def objects(tree: Any, *path: str) -> list[dict[str, Any]]:
    """The objects of a list at `path`."""
    value = at(tree, *path)
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def numbers(tree: Any, *path: str) -> list[float]:
    """The finite numbers of a list at `path`."""
    value = at(tree, *path)
    found = [number({"x": one}, "x") for one in value] if isinstance(value, list) else []
    return [one for one in found if one is not None]


def strings(tree: Any, *path: str) -> list[str]:
    """The strings of a list at `path`."""
    value = at(tree, *path)
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def mean(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None


def share(value: float | None, missing: str = NOT_MEASURED) -> str:
    """A number with three decimals and a true minus sign, fewer where it is large."""
    if value is None:
        return missing
    decimals = 3 if abs(value) < 100 else 1
    return f"{value:.{decimals}f}".replace("-", "−")  # noqa: RUF001 (the minus sign is meant)


def signed(value: float) -> str:
    """As `share`, with a plus where it is one."""
    return ("+" if value > 0 else "") + share(value)


def span(ends: Interval | None) -> str:
    """'0.51 to 0.82', empty without an interval."""
    return "" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}".replace("-", "−")  # noqa: RUF001


def gibibytes(value: float) -> str:
    """Bytes as GiB."""
    return f"{value / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
