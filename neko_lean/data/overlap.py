"""Find texts of one set in another: the same text cannot be forgotten and preserved, nor seen and unseen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import numpy as np

from neko_lean.data.example_types import Example
from neko_lean.data.examples import Rows
from neko_lean.data.scripts import fold
from neko_lean.errors import NekoLeanError
from neko_lean.terminal import log_line

# Length of the passages that are compared, in characters other than spaces. A shorter text must be equal as a whole.
_WINDOW = 40

_GROUP = 2**20  # characters that are hashed at a time

# Odd, so that it has an inverse modulo 2^64.
_BASE = 0x9E3779B97F4A7C15

_MAX_NAMED = 3  # row ids that an error names

# What is wrong with a text that is also in one of these sets.
_REASONS = {
    "forget": "so their text would be forgotten and preserved at the same time",
    "retain": "so the model has seen them",
}


def overlapping(forget: Iterable[str], others: Sequence[str]) -> list[int]:
    """The indices of the texts in `others` that are also forget texts.

    Two texts are the same if they differ only in spaces, case, or the encoding of their characters, or if one of them
    contains the other and that one has at least 40 characters. The time is linear in the total length.

    Args:
        forget: The texts to forget.
        others: The texts to search for them.

    Example:
        >>> overlapping(["Mira Tern lives in Oslo."], ["Oslo is a city.", "mira tern  lives in Oslo.\\n"])
        [1]
    """
    forget_texts = sorted({_key(text) for text in forget} - {""})
    texts = [_key(text) for text in others]
    whole = set(forget_texts)
    found = {index for index, text in enumerate(texts) if text in whole}

    found.update(index for index, _ in _contained_in(texts, forget_texts))
    found.update(index for _, index in _contained_in(forget_texts, texts))
    return sorted(found)


def without_overlap(
    known: Sequence[Example], others: list[Example], name: str, drop: bool, known_name: str = "forget"
) -> list[Example]:
    """The examples of `others` that are not in another set.

    Args:
        known: The forget set; for an anchor, also the retain set.
        others: The retain set or the anchor.
        name: What to call `others` in a message, such as "retain".
        drop: Leave the common examples out of `others`, instead of raising an error.
        known_name: "forget" or "retain".

    Raises:
        NekoLeanError: If the sets overlap and `drop` is off, or nothing is left.
    """
    common = overlapping([example.text for example in known], [example.text for example in others])
    if not common:
        return others
    count = f"{len(common)} of {len(others)} {name} rows"
    if not drop:
        ids = ", ".join(repr(others[index].id) for index in common[:_MAX_NAMED])
        more = ", ..." if len(common) > _MAX_NAMED else ""
        raise NekoLeanError(
            f"{count} are also in the {known_name} set (row {ids}{more}), {_REASONS[known_name]}: remove them from one "
            f"of the files, or pass --drop-overlap to leave them out of {name}."
        )
    if len(common) == len(others):
        raise NekoLeanError(f"all {len(others)} {name} rows are also in the {known_name} set; expected other rows.")
    log_line(f"warning: {count} are left out, because they are also in the {known_name} set.")
    dropped = set(common)
    kept = [example for index, example in enumerate(others) if index not in dropped]
    return Rows(kept, others.layout) if isinstance(others, Rows) else kept


def unseen_anchor(
    anchor: list[Example], forget: Sequence[Example], retain: Sequence[Example], drop: bool
) -> list[Example]:
    """The anchor without what the model has seen, see `without_overlap`."""
    anchor = without_overlap(retain, anchor, "anchor", drop, known_name="retain")
    return without_overlap(forget, anchor, "anchor", drop)


def _key(text: str) -> str:
    """The text in the form in which it is compared: folded, without spaces."""
    return "".join(fold(text).split())


def _contained_in(parts: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs (index of the part, index of the text) where the text contains the part, for parts of _WINDOW characters
    or more."""
    by_hash = _by_rarest_window(parts)
    if not by_hash:
        return

    wanted = np.fromiter(by_hash, np.uint64, len(by_hash))
    for first, group in _groups(texts):
        hashes = _window_hashes("".join(group))
        ends = np.cumsum([len(text) for text in group])
        # By sorting: NumPy 2.0 looks small ranges up in a table, whose bounds must fit into signed integers.
        places = np.isin(hashes, wanted, kind="sort").nonzero()[0]
        # Two texts next to each other also have common windows, which the comparison below rules out.
        owners = np.searchsorted(ends, places, side="right")
        for owner, match in dict.fromkeys(zip(owners.tolist(), hashes[places].tolist(), strict=True)):
            yield from ((number, first + owner) for number in by_hash[match] if parts[number] in group[owner])


def _by_rarest_window(parts: Sequence[str]) -> dict[int, list[int]]:
    """The indices of the parts of _WINDOW characters or more, by the hash of the part's window that the fewest share.

    With another window, such as the first, a system message that starts every part would make each of them a candidate
    in every text.
    """
    windows = {number: _covering_hashes(part) for number, part in enumerate(parts) if len(part) >= _WINDOW}
    if not windows:
        return {}
    distinct, counts = np.unique(np.concatenate(list(windows.values())), return_counts=True)
    by_hash: dict[int, list[int]] = {}
    for number, hashes in windows.items():
        rarest = counts[np.searchsorted(distinct, hashes)].argmin()
        by_hash.setdefault(int(hashes[rarest]), []).append(number)
    return by_hash


def _covering_hashes(text: str) -> np.ndarray:
    """Hashes of the windows that cover a text of n >= _WINDOW characters: [ceil(n / _WINDOW)] uint64."""
    hashes = _window_hashes(text)
    return hashes[[*range(0, len(hashes) - 1, _WINDOW), len(hashes) - 1]]


def _groups(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Consecutive texts with about _GROUP characters together, and the index of the first of them."""
    start, size = 0, 0
    for index, text in enumerate(texts, start=1):
        size += len(text)
        if size >= _GROUP or index == len(texts):
            yield start, list(texts[start:index])
            start, size = index, 0


def _window_hashes(text: str) -> np.ndarray:
    """A hash of each window of _WINDOW characters of a text of n characters: [n - _WINDOW + 1] uint64; [0] if n is
    smaller.

    A polynomial hash modulo 2^64, from differences of prefix sums.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64) + np.uint64(1)
    terms = characters * _powers(_BASE, len(text))
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    sums = prefix[_WINDOW:] - prefix[: len(prefix[_WINDOW:])]
    hashes: np.ndarray = sums * _powers(pow(_BASE, -1, 2**64), len(sums))
    return hashes


def _powers(base: int, count: int) -> np.ndarray:
    """1, base, base^2, ... modulo 2^64: [count] uint64."""
    return _all_powers(base, 1 << count.bit_length())[:count]


@cache
def _all_powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
