"""Batches: every example occurs exactly once, within the limits, and with little padding."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neko_lean.data.batching import length_batches, pad, paired_batches, random_batches
from neko_lean.data.examples import read_rows
from neko_lean.errors import NekoLeanError
from neko_lean.training.micro_batches import micro_batches
from tests.helpers import LUME


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=120),
    max_rows=st.integers(1, 40),
    max_tokens=st.integers(1, 4000),
)
def test_every_example_is_in_one_batch_and_no_batch_is_too_large(lengths, max_rows, max_tokens):
    limits = {"max_rows": max_rows, "max_tokens": max_tokens}
    by_length = length_batches(lengths, **limits)
    mixed = random_batches(lengths, **limits, rng=random.Random(0))
    for batches in (by_length, mixed):
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(1 <= len(batch) <= max_rows for batch in batches)
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in by_length)
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens for batch in mixed)
    assert [lengths[i] for batch in by_length for i in batch] == sorted(lengths)


@given(
    forget=st.lists(st.integers(1, 300), max_size=40),
    retain=st.lists(st.integers(1, 300), max_size=40),
    max_tokens=st.integers(300, 4000),
)
@settings(max_examples=50)
def test_steps_keep_to_the_token_budget_and_omit_no_example(forget, retain, max_tokens):
    options = {"forget_rows": 8, "retain_rows": 4, "max_tokens": max_tokens, "rng": random.Random(0)}
    if not forget and not retain:
        with pytest.raises(NekoLeanError, match="no rows"):
            next(paired_batches(forget, retain, **options))
        return

    seen_forget, seen_retain = set(), set()
    for forget_batch, retain_batch in itertools.islice(paired_batches(forget, retain, **options), 60):
        assert forget_batch or retain_batch
        tokens = sum(forget[i] for i in forget_batch) + sum(retain[i] for i in retain_batch)
        assert len(forget_batch) + len(retain_batch) <= 2 or tokens <= max_tokens
        seen_forget.update(forget_batch)
        seen_retain.update(retain_batch)
    # 60 steps of up to 8 and 4 examples cover 40 examples, unless steps had to be split.
    if max_tokens >= 300 * 12:
        assert seen_forget == set(range(len(forget))) and seen_retain == set(range(len(retain)))


@pytest.mark.skipif(not LUME.is_dir(), reason=f"no LUME data at {LUME}")
@pytest.mark.parametrize("limit", [128, 512])
def test_an_epoch_of_lume_has_at_most_10_percent_padding(limit):
    """With the micro-batches of the default step of 64 examples."""
    # Lengths in characters: a tokenizer only scales them, and this needs no tokenizer of a real model.
    examples = read_rows(LUME, "retain", "train")
    lengths = [min(limit, 1 + len(f"{example.input} {example.output}") // 4) for example in examples]
    positions = 0
    for batch in random_batches(lengths, max_rows=64, max_tokens=8192, rng=random.Random(0)):
        batch_lengths = [lengths[i] for i in batch]
        groups = micro_batches(batch_lengths, 2048)
        positions += sum(len(group) * max(batch_lengths[i] for i in group) for group in groups)
    assert 1 - sum(lengths) / positions <= 0.10


@pytest.mark.parametrize(
    ("left", "input_ids", "mask"),
    [
        (False, [[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        (True, [[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_sequences_are_padded_on_either_side(left, input_ids, mask):
    padded = pad([[5, 6, 7], [8]], 0, torch.device("cpu"), left=left)
    assert [tensor.tolist() for tensor in padded] == [input_ids, mask]
