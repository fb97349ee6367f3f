"""Micro-batches: least padding, and an even split across ranks."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from neko_lean.training.micro_batches import OVERHEAD, micro_batches, split_across_ranks


@given(lengths=st.lists(st.integers(1, 600), max_size=7), max_tokens=st.integers(1, 2000))
def test_micro_batches_have_minimal_cost(lengths, max_tokens):
    """Compared with every way of cutting the sorted lengths."""

    def cost(groups):
        return sum(len(group) * max(group) + OVERHEAD for group in groups)

    indices = micro_batches(lengths, max_tokens)
    assert sorted(i for group in indices for i in group) == list(range(len(lengths)))
    groups = [[lengths[i] for i in group] for group in indices]
    assert all(len(group) == 1 or len(group) * max(group) <= max_tokens for group in groups)
    rows = sorted(lengths)
    for cuts in range(2 ** max(0, len(rows) - 1)):
        borders = [0, *(n for n in range(1, len(rows)) if cuts >> (n - 1) & 1), len(rows)]
        other = [rows[a:b] for a, b in pairwise(borders) if a < b]
        if all(len(group) == 1 or len(group) * max(group) <= max_tokens for group in other):
            assert cost(groups) <= cost(other)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(20, 200), st.integers(1, 5))
def test_micro_batches_are_split_evenly_across_ranks(lengths, most, ranks):
    groups = micro_batches(lengths, most)
    pieces = split_across_ranks(groups, lengths, ranks)
    assert sorted(i for group in pieces for i in group) == list(range(len(lengths)))
    assert len(pieces) % ranks == 0
    if ranks == 1:
        assert pieces == groups

    def padded_size(group):
        return len(group) * max((lengths[i] for i in group), default=0)

    largest = max(map(padded_size, groups))
    assert max(map(padded_size, pieces)) <= largest
    count = len(pieces) // ranks
    sizes = [sum(map(padded_size, pieces[n * count : (n + 1) * count])) for n in range(ranks)]
    assert max(sizes) - min(sizes) <= count * largest
    # A micro-batch is empty only if no other can be halved.
    assert all(pieces) or max(map(len, pieces)) == 1
