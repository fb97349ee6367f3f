"""Group examples into batches, and pad them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    pass


def length_batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int) -> list[list[int]]:
    """Indices of rows, in batches of at most `max_rows` rows and `max_tokens` positions, padding included.

    Rows of like length go together, shortest first, so the batches are the same on every run. A single row longer than
    `max_tokens` becomes a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        batch = batches[-1] if batches else []
        if not batch or len(batch) == max_rows or (len(batch) + 1) * lengths[index] > max_tokens:
            batch = []
            batches.append(batch)
        batch.append(index)
    return batches


def random_batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int, rng: random.Random) -> list[list[int]]:
    """Indices of rows in random order, in batches of at most `max_rows` rows and `max_tokens` tokens.

    Long rows and short ones go together: batches by length would train long documents and short answers in turn, each
    undoing some of what the other did. A step puts rows of like length into micro-batches by itself.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    tokens = 0
    for index in order:
        if not batches or len(batches[-1]) == max_rows or tokens + lengths[index] > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches


def paired_batches(
    forget: Sequence[int],
    retain: Sequence[int],
    *,
    forget_rows: int,
    retain_rows: int,
    max_tokens: int,
    rng: random.Random,
) -> Iterator[tuple[list[int], list[int]]]:
    """Endless steps of (forget indices, retain indices), drawn from two lists of lengths; either list may be empty.

    Each set goes through its rows in an order of its own. A step of more than `max_tokens` tokens is halved.
    """

    def endless(lengths: Sequence[int], max_rows: int) -> Iterator[list[int]]:
        while lengths:
            yield from random_batches(lengths, max_rows=max_rows, max_tokens=max_tokens, rng=rng)
        yield from itertools.repeat([])

    def fits(left: list[int], right: list[int]) -> bool:
        tokens = sum(forget[i] for i in left) + sum(retain[i] for i in right)
        return tokens <= max_tokens or len(left) + len(right) <= 2

    if not forget and not retain:
        raise NekoLeanError("there are no rows to train on.")
    for pair in zip(endless(forget, forget_rows), endless(retain, retain_rows), strict=True):
        pending = [pair]
        while pending:
            one, two = pending.pop()
            if fits(one, two):
                yield one, two
            else:
                pending.append((one[: len(one) // 2], two[: len(two) // 2]))
                pending.append((one[len(one) // 2 :], two[len(two) // 2 :]))


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: Any, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token lists as one rectangle: ids [B, L] int64 and a 0/1 mask [B, L], padded right (or left)."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        part = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, part] = torch.tensor(row)
        mask[number, part] = 1
    return ids.to(device), mask.to(device)
