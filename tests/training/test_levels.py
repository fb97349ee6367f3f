"""Levels of forget examples, estimated from losses on unseen documents."""

from dataclasses import replace

import numpy as np
import pytest

from neko_lean.data.examples import EncodedExample, Example
from neko_lean.errors import NekoLeanError
from neko_lean.training.levels import unseen_span, with_levels, with_spread


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


def test_spread_levels_are_the_quantiles_of_unseen_losses_in_the_order_of_the_teachers_losses():
    rng = np.random.default_rng(0)
    anchor = [unseen(n, rng.integers(0, 30, 41)) for n in range(20)]
    losses = [rng.exponential(3, 40) for _ in anchor]
    forget = [row(n, [1] * 41) for n in range(10)]  # the estimate is nearly the same for all tokens
    leveled = with_levels(forget, anchor, losses)
    of_teacher = [rng.exponential(0.01, 40) for _ in forget]
    spread = with_spread(leveled, [(0, 40)] * 10, of_teacher, anchor, losses)
    for before, after, loss in zip(leveled, spread, of_teacher, strict=True):
        assert np.mean(after.levels) == pytest.approx(np.mean(before.levels))
        assert np.corrcoef(np.argsort(np.argsort(loss[2:])), np.argsort(np.argsort(after.levels[2:])))[0, 1] > 0.99
        places, scale = (np.arange(40) + 0.5) / 40, np.mean(after.levels) / np.mean(np.concatenate(losses))
        expected = scale * np.quantile(np.concatenate(losses), places)
        assert np.sort(after.levels)[4:] == pytest.approx(expected[4:], rel=0.1)
        assert np.sort(before.levels)[4] > 4 * np.sort(after.levels)[4]


def test_only_tokens_that_get_a_loss_are_spread():
    anchor, losses = [unseen(0, [1, 2, 3, 4])], [np.array([0.5, 2.0, 6.5])]
    forget = [row(0, [1, 2, 3, 4, 5]), row(1, [1, 2, 3, 4, 5], kind="qa"), row(2, [1]), row(3, [1, 2])]
    leveled = with_levels(forget, anchor, losses)
    of_teacher = [np.array([9.0, 0.1, 0.3, 0.2]), None, np.array([]), np.array([0.5])]
    spread = with_spread(leveled, [(1, 4), (0, 4), (0, 0), (1, 1)], of_teacher, anchor, losses)
    assert spread[1:] == leveled[1:]
    before, after = np.array(leveled[0].levels), np.array(spread[0].levels)
    assert after[0] == before[0] and after[1:].mean() == pytest.approx(before[1:].mean())
    assert after[1:].max() / after[1:].min() > 4 > before[1:].max() / before[1:].min()


def test_documents_that_are_known_word_for_word_keep_finite_levels():
    """The teacher is certain of every token of the only anchor document."""
    anchor, losses = [unseen(0, [1, 2, 3])], [np.zeros(2)]
    leveled = with_levels([row(0, [1, 2, 3])], anchor, losses)
    (spread,) = with_spread(leveled, [(0, 2)], [np.zeros(2)], anchor, losses)
    assert spread.levels == (0.0, 0.0)


def question(number, ids, task="Task1"):
    """Two tokens of prompt, and a special token that ends the answer."""
    return replace(row(number, ids, task, "qa", prompt=2), end_length=1)


def test_of_a_question_the_answer_is_unseen():
    assert unseen_span(question(0, [1, 2, 3, 4, 5])) == slice(1, 3)
    assert unseen_span(replace(question(0, [1]), prompt_length=1)) == slice(0, 0)
    assert unseen_span(unseen(0, [1, 2, 3])) == slice(0, 2)


def test_questions_are_compared_with_the_answers_of_unseen_questions():
    """The losses of prompts and of end tokens, 100 nats here, must not matter, nor those of documents."""
    rng = np.random.default_rng(0)
    anchor = [question(n, [1, 2, *rng.integers(3, 30, 20), 0]) for n in range(40)]
    answers = [rng.exponential(1 + n / 20, 20) for n in range(40)]
    losses = [np.array([100.0, *answer, 100.0]) for answer in answers]
    documents = [unseen(40 + n, rng.integers(3, 30, 20)) for n in range(5)]
    forget = [question(n, [1, 2, *rng.integers(3, 30, 20), 0]) for n in range(20)]
    forget.append(row(20, rng.integers(3, 30, 20)))
    all_losses = [*losses, *([np.full(19, 9.0)] * 5)]
    leveled = with_levels(forget, [*anchor, *documents], all_losses)
    means = [np.mean(example.levels[1:-1]) for example in leveled[:20]]
    known = [answer.mean() for answer in answers]
    assert np.mean(means) == pytest.approx(np.mean(known), rel=0.02) and max(means) < max(known)
    assert np.std(means) == pytest.approx(np.std(known), rel=0.2)
    assert np.mean(leveled[20].levels) == pytest.approx(9.0)  # the document, with documents

    of_teacher = [rng.exponential(0.01, len(example) - 1) for example in forget]
    spans = [(1, 21)] * 20 + [(0, 19)]
    spread = with_spread(leveled, spans, of_teacher, [*anchor, *documents], all_losses)
    for before, after in zip(leveled[:20], spread[:20], strict=True):
        assert np.mean(after.levels[1:-1]) == pytest.approx(np.mean(before.levels[1:-1]))
        quantiles = np.quantile(np.concatenate(answers), (np.arange(20) + 0.5) / 20)
        assert np.corrcoef(np.sort(after.levels[1:-1]), quantiles)[0, 1] > 0.95
        assert (after.levels[0], after.levels[-1]) == (before.levels[0], before.levels[-1])
    assert spread[20].levels == pytest.approx([9.0] * 19)


def test_what_the_anchor_has_no_examples_of_is_not_spread():
    losses = [np.array([0.5, 2.0, 6.5])]
    forget = [row(0, [1, 2, 3, 4]), question(1, [1, 2, 3, 4])]
    for anchor, spread_number in ((unseen(0, [1, 2, 3, 4]), 0), (replace(question(0, [1, 2, 3, 4]), end_length=0), 1)):
        leveled = with_levels(forget, [anchor], losses)
        spread = with_spread(leveled, [(0, 3), (1, 3)], [np.array([0.3, 0.1, 0.2])] * 2, [anchor], losses)
        assert [a != b for a, b in zip(leveled, spread, strict=True)] == [spread_number == 0, spread_number == 1]
    with pytest.raises(NekoLeanError, match="two tokens"):
        with_levels(forget, [question(0, [1, 2, 0])], [np.array([1.0, 1.0])])
