"""Levels of forget examples, estimated from losses on unseen documents."""

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


def test_common_phrases_get_low_levels_and_unknown_tokens_high_ones():
    """Token 9 follows 8 in every document and costs little there, but more elsewhere. Rare tokens cost most."""
    anchor = [unseen(n, [1, 8, 9, 20 + n, 9]) for n in range(6)]
    losses = [np.array([4.0, 0.1, 12.0, 6.0])] * 6
    (leveled,) = with_levels([row(0, [1, 8, 9, 77, 9])], anchor, losses)
    first, phrase, name, alone = leveled.levels
    assert phrase < 0.7 < first and phrase < alone < name
    # The example's mean level is the mean loss of the documents.
    assert np.mean(leveled.levels) == pytest.approx(np.mean(losses[0]))


def test_mean_levels_are_distributed_as_losses_of_unseen_documents():
    rng = np.random.default_rng(0)
    anchor = [unseen(n, rng.integers(0, 30, 40)) for n in range(50)]
    losses = [rng.normal(5 + n / 10, 1, 39) for n in range(50)]
    forget = [row(n, rng.integers(0, 30, 40)) for n in range(20)]
    means = [np.mean(leveled.levels) for leveled in with_levels(forget, anchor, losses)]
    known = [loss.mean() for loss in losses]
    assert np.mean(means) == pytest.approx(np.mean(known), rel=0.01)
    assert np.std(means) == pytest.approx(np.std(known), rel=0.1)
    assert all(level >= 0 for leveled in with_levels(forget, anchor, losses) for level in leveled.levels)


def test_each_task_is_compared_with_its_own_documents():
    anchor = [unseen(0, [1, 2, 3], "Task1"), unseen(1, [1, 2, 3], "Task2"), unseen(2, [1, 2, 3], "anchor")]
    losses = [np.array([1.0, 1.0]), np.array([7.0, 7.0]), np.array([4.0, 4.0])]
    forget = [row(0, [1, 2, 3], "Task2"), row(1, [1, 2, 3], "Task1"), row(2, [1, 2, 3], "Task3")]
    means = [np.mean(leveled.levels) for leveled in with_levels(forget, anchor, losses)]
    assert means == pytest.approx([7.0, 1.0, 4.0])
    # Questions are scaled like the documents of their task.
    both = with_levels([row(0, [1, 2, 3]), row(1, [1, 2, 3], kind="qa")], anchor, losses)
    assert both[1].levels == pytest.approx(both[0].levels)
    assert np.isfinite(with_levels([row(1, [4, 5], kind="qa")], anchor, losses)[0].levels).all()


def test_examples_and_documents_of_one_token_are_handled():
    anchor = [unseen(0, [1]), unseen(1, [1, 2, 3])]
    losses = [np.array([]), np.array([2.0, 2.0])]
    leveled = with_levels([row(0, [1]), row(1, [1, 2])], anchor, losses)
    assert [example.levels for example in leveled] == [(), (2.0,)]
    with pytest.raises(NekoLeanError, match="two tokens"):
        with_levels([row(0, [1, 2])], anchor[:1], losses[:1])
