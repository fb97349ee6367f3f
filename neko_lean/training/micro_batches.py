"""Group the examples of a step into micro-batches with little padding, and split those across ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

# Cost of one more micro-batch, in positions: it reads every layer's weights and launches its kernels once more.
OVERHEAD = 128


@dataclass(frozen=True)
class MicroBatches:
    """Token ids as the model takes them, and which of their positions reach the head."""

    # Of each micro-batch: [b, l] int64, right-padded, examples of similar length together; or packed, [1, l].
    input_ids: list[Tensor]
    position_ids: list[Tensor | None]  # of packed ones: each token's position in its example, [1, l] int64
    index: list[Tensor]  # [n] int64 into each micro-batch's flattened b * l; the n add up to N


def micro_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Group examples into micro-batches of at most `max_tokens` positions, so that padding plus `OVERHEAD` is minimal.

    Examples of similar length share a micro-batch. The cuts in the list sorted by length are optimal (dynamic
    programming). An example longer than `max_tokens` gets a micro-batch of its own.

    Args:
        lengths: number of tokens of each example.
        max_tokens: most positions of a micro-batch, padding included.
        packed: whether examples are concatenated, so that no position is padding.

    Returns:
        Indices into `lengths`, one list for each micro-batch, shortest examples first.

    Example:
        >>> micro_batches([900, 10, 12, 880], max_tokens=2048)
        [[1, 2], [3, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    ends = [0, *accumulate(lengths[i] for i in order)]

    # best_cost[n]: cost of the first n examples; last_cut[n]: where their last micro-batch starts.
    best_cost, last_cut = [0], [0]
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        sizes = [ends[stop] - ends[start] if packed else (stop - start) * longest for start in range(stop)]
        starts = [start for start in range(stop) if sizes[start] <= max_tokens or start == stop - 1]
        costs = {start: best_cost[start] + sizes[start] + OVERHEAD for start in starts}
        last_cut.append(min(costs, key=costs.__getitem__))
        best_cost.append(costs[last_cut[-1]])

    # Walk back along the cuts.
    groups = []
    stop = len(order)
    while stop:
        groups.append(order[last_cut[stop] : stop])
        stop = last_cut[stop]
    return groups[::-1]


def split_across_ranks(groups: Sequence[Sequence[int]], lengths: Sequence[int], world_size: int) -> list[Sequence[int]]:
    """Distribute micro-batches over ranks: the same number for each, because ranks gather every layer together, and of
    similar total size.

    Large micro-batches are halved until their number is a multiple of `world_size`. With too few examples for that,
    some micro-batches are empty.

    Returns:
        All micro-batches, those of rank 0 first.
    """
    if world_size == 1:
        return list(groups)

    def padded_size(group: Sequence[int]) -> int:
        return len(group) * max((lengths[i] for i in group), default=1)

    # Halve the largest micro-batch until they divide evenly.
    pieces = sorted(groups, key=padded_size)
    while len(pieces) % world_size:
        largest = max((group for group in pieces if len(group) > 1), key=padded_size, default=None)
        if largest is None:
            pieces.append([])
            continue
        pieces.remove(largest)
        pieces += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]

    # Largest first, each to the rank with the least work so far.
    per_rank: list[list[Sequence[int]]] = [[] for _ in range(world_size)]
    for group in sorted(pieces, key=padded_size, reverse=True):
        open_ranks = [assigned for assigned in per_rank if len(assigned) < len(pieces) // world_size]
        min(open_ranks, key=lambda assigned: sum(map(padded_size, assigned))).append(group)
    return [group for assigned in per_rank for group in assigned]
