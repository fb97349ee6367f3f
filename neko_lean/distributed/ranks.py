"""Ranks: which process of the torchrun command this is, and which items it works on.

A rank is one process that torchrun starts. Without torchrun there is a single rank, number 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_as_single_process = False


def rank() -> int:
    """The number of this process among all processes of the command, on all machines."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def world_size() -> int:
    """The number of processes that torchrun started for this command; 1 without torchrun."""
    # WORLD_SIZE alone is not enough: batch systems also set it, for processes that run independently.
    launched_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and not _as_single_process
    return int(os.environ["WORLD_SIZE"]) if launched_by_torchrun else 1


def local_rank() -> int:
    """The number of this process among those on its machine, which is also the index of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """The number of the command's processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def is_main_process() -> bool:
    """Whether this is rank 0, which prints and writes everything that exists only once."""
    return rank() == 0


@contextmanager
def as_single_process() -> Iterator[None]:
    """Context manager in which this process acts as if it were the only one.

    Within it `rank` is 0, `world_size` is 1, and every collective operation returns without communicating.
    """
    global _as_single_process  # not a context variable: other threads must see it as well
    previous, _as_single_process = _as_single_process, True
    try:
        yield
    finally:
        _as_single_process = previous


def items_of_rank(items: Sequence[T]) -> Sequence[T]:
    """The items that this rank works on: every `world_size()`-th, starting at item `rank()`.

    Items that are sorted by length are therefore divided evenly. `merge_items_of_ranks` is the inverse.
    """
    return items[rank() :: world_size()]


def group_by_round(items: Sequence[T]) -> list[Sequence[T]]:
    """Group items by the round in which the ranks process them.

    In round `i` each rank processes item `i` of its `items_of_rank(items)`, so a round holds up to `world_size()`
    consecutive items. Progress bars use this to count the items of all ranks.
    """
    return [items[start : start + world_size()] for start in range(0, len(items), world_size())]


def flatten_in_rank_order(batches: Sequence[Sequence[T]]) -> list[T]:
    """The contents of all batches, in the order in which an all-gather concatenates them.

    First come the batches of rank 0 (see `items_of_rank`), then those of rank 1, and so on.
    """
    return [
        item for rank_number in range(world_size()) for batch in batches[rank_number :: world_size()] for item in batch
    ]
