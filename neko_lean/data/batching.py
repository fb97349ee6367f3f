"""Group examples into batches by their lengths, and pad batches to tensors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError


def length_batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int) -> list[list[int]]:
    """Group examples of similar length into batches, for passes without training.

    The order is deterministic, shortest example first. An example longer than `max_tokens` forms a batch by itself.

    Args:
        lengths: The length of each example in tokens.
        max_rows: The maximum number of examples in a batch.
        max_tokens: The maximum number of positions in a batch, including padding.

    Returns:
        For each batch the indices of its examples.

    Example:
        >>> length_batches([5, 2, 9, 3], max_rows=2, max_tokens=10)
        [[1, 3], [0], [2]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # The examples are sorted, so the current one determines the padded length.
        is_full = not batches or len(batches[-1]) == max_rows
        if is_full or (len(batches[-1]) + 1) * lengths[index] > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def random_batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int, rng: random.Random) -> list[list[int]]:
    """Group examples into batches in random order, for training.

    Batches mix short and long examples on purpose. With batches of similar length, steps on long documents and steps on
    short answers would alternate and partly undo each other. The training step forms micro-batches of similar length.

    Args:
        lengths: The length of each example in tokens.
        max_rows: The maximum number of examples in a batch.
        max_tokens: The maximum number of tokens in a batch, without padding.
        rng: The source of randomness.

    Returns:
        For each batch the indices of its examples.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)

    batches: list[list[int]] = []
    batch_tokens = 0
    for index in order:
        if not batches or len(batches[-1]) == max_rows or batch_tokens + lengths[index] > max_tokens:
            batches.append([])
            batch_tokens = 0
        batches[-1].append(index)
        batch_tokens += lengths[index]
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
    """Yield the training steps of a run, endlessly: one batch of the forget set and one of the retain set each.

    Each set is shuffled anew in every epoch. A step with more than `max_tokens` tokens is split in half.

    Args:
        forget: The length of each forget example in tokens. May be empty.
        retain: The length of each retain example in tokens. May be empty.
        forget_rows: The maximum number of forget examples in a step.
        retain_rows: The maximum number of retain examples in a step.
        max_tokens: The maximum number of tokens in a step, without padding.
        rng: The source of randomness.

    Yields:
        The indices of the step's forget examples and of its retain examples.

    Raises:
        NekoLeanError: If both sets are empty.
    """
    if not forget and not retain:
        raise NekoLeanError("there are no rows to train on; the forget set and the retain set are both empty.")

    def epochs(lengths: Sequence[int], max_rows: int) -> Iterator[list[int]]:
        while lengths:
            yield from random_batches(lengths, max_rows=max_rows, max_tokens=max_tokens, rng=rng)
        yield from itertools.repeat([])

    def fits(forget_batch: list[int], retain_batch: list[int]) -> bool:
        tokens = sum(forget[i] for i in forget_batch) + sum(retain[i] for i in retain_batch)
        return tokens <= max_tokens or len(forget_batch) + len(retain_batch) <= 2

    for pair in zip(epochs(forget, forget_rows), epochs(retain, retain_rows), strict=True):
        # Split steps that are too large, first half first.
        pending = [pair]
        while pending:
            forget_batch, retain_batch = pending.pop()
            if fits(forget_batch, retain_batch):
                yield forget_batch, retain_batch
            else:
                forget_half, retain_half = len(forget_batch) // 2, len(retain_batch) // 2
                pending.append((forget_batch[:forget_half], retain_batch[:retain_half]))
                pending.append((forget_batch[forget_half:], retain_batch[retain_half:]))


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Pad token sequences to the length of the longest.

    Args:
        sequences: B sequences of token ids.
        pad_id: The token id to pad with.
        device: The device of the returned tensors.
        left: Pad on the left instead of on the right.

    Returns:
        Token ids [B, L] int64, and an attention mask [B, L] int64 that is 0 at padding.
    """
    length = max(map(len, sequences))
    input_ids = torch.full((len(sequences), length), pad_id)  # [B, L]
    mask = torch.zeros_like(input_ids)  # [B, L]
    for row, sequence in enumerate(sequences):
        columns = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        input_ids[row, columns] = torch.tensor(sequence)
        mask[row, columns] = 1
    return input_ids.to(device), mask.to(device)
