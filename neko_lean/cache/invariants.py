"""The rules of FORMAT.md for the numbers in a shard."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# The entries of a position must sum to 1 - exp(tail_logp) within these tolerances.
MASS_TOLERANCE = 2e-3  # relative: float16 rounds each entry by up to 2^-11
SUM_TOLERANCE = 1e-5  # absolute: the rounding error of a float32 sum over the vocabulary

MAX_LOGP = 1e-6  # rounding can move the log-probability of a certain token this far above 0


class StoredPositions(NamedTuple):
    """n consecutive positions of a retain shard, with E entries in total."""

    sizes: np.ndarray  # [n] int64, number of entries of each position
    ids: np.ndarray  # [E] token ids, most likely first within each position
    p: np.ndarray  # [E] float32, probabilities
    tail_logp: np.ndarray  # [n] float32, log of the probability outside the entries


def find_violation(positions: StoredPositions, *, vocab_size: int, allow_zero: bool) -> str | None:
    """Check the entries of some positions.

    Args:
        positions: positions with at least one entry each.
        vocab_size: number of tokens in the vocabulary.
        allow_zero: accept entries of probability 0, except a position's first entry. In format version 1, entries could
            underflow; they count as part of the tail.

    Returns:
        The first rule that is broken, as a phrase, or None.
    """
    sizes, ids, p, tail_logp = positions
    owner = np.repeat(np.arange(len(sizes)), sizes)  # [E], the position that each entry belongs to
    first = np.cumsum(sizes) - sizes  # [n], index of each position's first entry

    # Token ids: in the vocabulary, and distinct within a position.
    unknown = (ids < 0) | (ids >= vocab_size)
    if unknown.any():
        return f"token id {ids[unknown][0]} is not in the vocabulary of {vocab_size}"
    pairs = np.sort(owner * vocab_size + ids)
    if (pairs[1:] == pairs[:-1]).any():
        return "a position holds a token id twice"

    # Probabilities: finite, above 0, and sorted within a position.
    invalid = ~(np.isfinite(p) & (p >= 0))
    if invalid.any():
        return f"a stored probability is {p[invalid][0]}"
    if (np.diff(p)[np.diff(owner) == 0] > 0).any():
        return "entries are not sorted by probability"
    if (p[first] if allow_zero else p).min(initial=1.0) <= 0:
        return "a stored probability is 0"
    if not (tail_logp < 0).all():
        return f"tail_logp {tail_logp[~(tail_logp < 0)][0]} is not the logarithm of a probability below 1"

    # Entries and tail sum to 1. For an empty tail, tail_logp is -inf and the entries sum to 1.
    mass = -np.expm1(tail_logp.astype(np.float64))  # [n]
    total = np.add.reduceat(p.astype(np.float64), first)  # [n]
    if not (np.abs(total - mass) <= MASS_TOLERANCE * mass + SUM_TOLERANCE).all():
        return "probabilities do not sum to 1"
    return None
