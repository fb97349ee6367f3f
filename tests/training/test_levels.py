"""Levels: what a token of an unseen document costs, judged from the anchor's losses."""

from dataclasses import replace

import numpy as np
import pytest

from neko_lean.data.examples import EncodedExample, Example
from neko_lean.errors import NekoLeanError
from neko_lean.training.levels import with_levels


def row(number, ids, task="Task1", kind="sc", prompt=0):
    return EncodedExample(Example(f"{number}-{kind}1", "in", "out", task), list(ids), prompt, 0)


def unseen(number, ids, task="Task1"):
    return replace(row(number, ids), example=Example(f"anchor {number}", "", "text", task))


def test_phrases_cost_little_and_unknown_tokens_much():
    """Token 9 follows 8 in every document and is cheap there; elsewhere it is dear; what occurs once is dearest."""
    anchor = [unseen(n, [1, 8, 9, 20 + n, 9]) for n in range(6)]
    losses = [np.array([4.0, 0.1, 12.0, 6.0])] * 6
    (one,) = with_levels([row(0, [1, 8, 9, 77, 9])], anchor, losses)
    first, phrase, name, alone = one.levels
    assert phrase < 0.7 < first and phrase < alone < name
    # The row's mean is that of the anchor's documents.
    assert np.mean(one.levels) == pytest.approx(np.mean(losses[0]))


def test_rows_are_spread_as_unseen_documents_are():
    rng = np.random.default_rng(0)
    anchor = [unseen(n, rng.integers(0, 30, 40)) for n in range(50)]
    losses = [rng.normal(5 + n / 10, 1, 39) for n in range(50)]
    forget = [row(n, rng.integers(0, 30, 40)) for n in range(20)]
    means = [np.mean(one.levels) for one in with_levels(forget, anchor, losses)]
    known = [loss.mean() for loss in losses]
    assert np.mean(means) == pytest.approx(np.mean(known), rel=0.01)
    assert np.std(means) == pytest.approx(np.std(known), rel=0.1)
    assert all(level >= 0 for one in with_levels(forget, anchor, losses) for level in one.levels)


def test_each_task_is_judged_by_its_own_documents():
    anchor = [unseen(0, [1, 2, 3], "Task1"), unseen(1, [1, 2, 3], "Task2"), unseen(2, [1, 2, 3], "anchor")]
    losses = [np.array([1.0, 1.0]), np.array([7.0, 7.0]), np.array([4.0, 4.0])]
    forget = [row(0, [1, 2, 3], "Task2"), row(1, [1, 2, 3], "Task1"), row(2, [1, 2, 3], "Task3")]
    means = [np.mean(one.levels) for one in with_levels(forget, anchor, losses)]
    assert means == pytest.approx([7.0, 1.0, 4.0])
    # Questions are scaled as their task's documents are.
    both = with_levels([row(0, [1, 2, 3]), row(1, [1, 2, 3], kind="qa")], anchor, losses)
    assert both[1].levels == pytest.approx(both[0].levels)
    assert np.isfinite(with_levels([row(1, [4, 5], kind="qa")], anchor, losses)[0].levels).all()


def test_rows_and_documents_of_one_token_are_borne():
    anchor = [unseen(0, [1]), unseen(1, [1, 2, 3])]
    losses = [np.array([]), np.array([2.0, 2.0])]
    found = with_levels([row(0, [1]), row(1, [1, 2])], anchor, losses)
    assert [one.levels for one in found] == [(), (2.0,)]
    with pytest.raises(NekoLeanError, match="two tokens"):
        with_levels([row(0, [1, 2])], anchor[:1], losses[:1])
