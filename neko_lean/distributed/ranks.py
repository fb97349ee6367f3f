"""The processes that torchrun started for one command, its ranks: which of them is this?

Without torchrun there is one. How ranks talk to each other is collective.py's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


_alone = False


def rank() -> int:
    """This process's number among all of the command's, on all machines."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes torchrun started for this command; 1 without it."""
    # Batch systems set WORLD_SIZE, too, for processes that know nothing of each other.
    launched = "TORCHELASTIC_RUN_ID" in os.environ and not _alone
    return int(os.environ["WORLD_SIZE"]) if launched else 1


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """How many of the command's processes run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def is_main_process() -> bool:
    """Whether this is the rank that talks and writes what there is one of."""
    return rank() == 0


@contextmanager
def as_single_process() -> Iterator[None]:
    """Within it this process counts as the only one: it does the whole of a thing, by itself."""
    global _alone  # threads, too, must see it
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def items_of_rank(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of some items, every `size()`-th, so that a list in order of length is split evenly."""
    return items[rank() :: world_size()]


def group_by_round(items: Sequence[T]) -> list[Sequence[T]]:
    """For each item of the first rank's share, what all ranks are at meanwhile: it and those beside it."""
    return [items[start : start + world_size()] for start in range(0, len(items), world_size())]


def flatten_in_rank_order(batches: Sequence[Sequence[T]]) -> list[T]:
    """What is in the batches, in the order in which the ranks' shares of the batches follow one another."""
    return [one for number in range(world_size()) for batch in batches[number :: world_size()] for one in batch]
