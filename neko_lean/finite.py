"""Numbers that are NaN or infinite: an error where a result would be wrong, null where only a log holds them.

JSON knows neither, and a comparison with NaN is always false, so that a broken model can look like a perfect one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError


def strict_json(value: Any, what: str, indent: int | None = None) -> str:
    """`value` as JSON. Raises NekoLeanError naming the first key of `what` whose number is NaN or infinite."""
    for path, number in _numbers(value):
        if not math.isfinite(number):
            raise NekoLeanError(
                f"{what} would say {number} for {path}: no such number is a result, so run it in --dtype float32, or "
                f"give a checkpoint whose training did not diverge."
            )
    return json.dumps(value, indent=indent, allow_nan=False)


def or_null(value: Any) -> Any:
    """`value` with None in the place of every number that is NaN or infinite, for JSON that only informs."""
    if isinstance(value, Mapping):
        return {key: or_null(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [or_null(one) for one in value]
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


def refuse_broken_outputs(values: Tensor, what: str) -> None:
    """Raise NekoLeanError when a model's outputs hold NaN or infinite values; `what` says which, in the singular."""
    if not bool(torch.isfinite(values).all()):
        raise NekoLeanError(
            f"the model's output for {what} is NaN or infinite, so no result would be right: run it with --dtype "
            f"float32, or give a checkpoint whose training did not diverge."
        )


def likeliest(logits: Tensor, what: str) -> Tensor:
    """The likeliest token of each row of logits [N, V]: [N] int64. NaN would win every comparison, and is refused."""
    best, token = logits.max(1)
    refuse_broken_outputs(best, what)
    return token
