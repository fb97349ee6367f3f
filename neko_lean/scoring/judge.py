"""Four judgements of a scored model: did it forget, retain the rest, look unseen, and does it still write?

All thresholds are here, except those of a single text in `degenerate`. The verdict's sentences, the report's signs, the
terminal table and `broken` all come from these functions, so they cannot contradict each other. `before` is the content
of scores.json of the model before unlearning; without it, the differences in the scores tell what that model scored.
Scores may lack any key, because they may be of an older version or edited: what is missing makes an answer unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neko_lean.scoring.membership_headline import membership_tests
from neko_lean.scoring.values import mean, number, value_at

YES, PARTLY, NO, UNKNOWN = "yes", "partly", "no", "unknown"
# Forgotten: at most this share of forget answers is left, to the letter or within the text ...
MAX_ANSWERS_LEFT = 0.05
# ... and no regurgitation is above this ROUGE-L recall; common words alone give unseen text 0.2 to 0.4.
MAX_TEXT_LEFT = 0.5
# Not forgotten: the mean of the forget cells is above this share of what it was.
REMEMBERED_SHARE = 0.8
# Hidden: the true answers' tokens have a higher probability than this although the answers are not generated.
LIKELY_PROBABILITY = 0.5
# Retained: the mean of the retain cells, and each single cell, are at least these shares of what they were ...
RETAINED_MEAN, RETAINED_CELL = 0.95, 0.9
# ... or, if that is not known, every retain cell is at least this.
HIGH_CELL = 0.9
# Partly retained: the mean of the retain cells is at least this share of what it was.
PARTLY_RETAINED_MEAN = 0.6
# Degenerate: this share more of the outputs is degenerate than of what they are compared with.
MAX_DEGENERATE = 0.2
# Noise: entropy or loss of at least this share of a uniform guess's.
NOISE_SHARE = 0.9
# Broken: the loss on unseen text rose by more than this share.
MAX_LOSS_INCREASE = 0.2
LEAK_FORMS = ("contained", "alphanumeric", "digits")
DIGITS = 9  # a value computed from a difference may be off in later decimal places
ROUNDING = 10**-DIGITS


def cells_key(scores: Any) -> str:
    """The key of the cells that are judged: `unicode_cells`, or `cells` in older scores that lack them."""
    cells = scores.get("unicode_cells") if isinstance(scores, Mapping) else None
    measured = isinstance(cells, Mapping) and any(number(cells, cell) is not None for cell in cells)
    return "unicode_cells" if measured else "cells"


def judged_cells(scores: Any, split: str) -> dict[str, float]:
    """The measured cells of a split, by name."""
    cells = scores.get(cells_key(scores)) if isinstance(scores, Mapping) else None
    names = [name for name in cells if name.startswith(f"{split}.")] if isinstance(cells, Mapping) else []
    return {name: value for name in names if (value := number(cells, name)) is not None}


def cells_before(scores: Any, before: Any, split: str) -> dict[str, float]:
    """The same cells of the model before, as far as they are known."""
    key, cells = cells_key(scores), judged_cells(scores, split)
    # An older `before` has official cells only, which are no start for cells that these judge differently.
    official = all(number(scores, "cells", name) == after for name, after in cells.items())
    known = {}
    for name, after in cells.items():
        start = value_before(scores, before, after, key, name)
        if start is None and official:
            start = number(before, "cells", name)
        if start is not None:
            known[name] = start
    return known


def value_before(scores: Any, before: Any, after: float, *path: str) -> float | None:
    """The value before of the number at a path, from `before` or else from the difference in the scores.

    Both are rounded alike, so that the words, in which 0.0125 may become 0.012 or 0.013, do not depend on the source.
    """
    start, change = number(before, *path), number(scores, "difference", ".".join(path), "difference")
    if start is None and change is not None:
        start = after - change
    return None if start is None else round(start, DIGITS)


def relearned_losses(scores: Any) -> list[tuple[float, float]]:
    """Pairs of steps of the relearning attack and the loss of the answers it does not train on, in nats a token."""
    points = value_at(scores, "attacks", "relearn")
    pairs = [
        (number(point, "steps"), number(point, "answer_nll")) for point in (points if isinstance(points, list) else [])
    ]
    return sorted((steps, loss) for steps, loss in pairs if steps is not None and loss is not None)


def leaked_answers(scores: Any) -> tuple[float, str]:
    """The largest share of forget answers that occur in the generations in some form, and the form."""
    # An answer that occurs as words also occurs as letters and digits; `max` returns the first of equal shares.
    shares = ((number(scores, "leaks", "forget", form) or 0.0, form) for form in LEAK_FORMS)
    return max(shares, key=lambda share: share[0])


def hides_answers(scores: Any) -> bool:
    """Whether the model does not generate the forget answers, but still assigns them a high probability."""
    generated = mean(judged_cells(scores, "forget"))
    probability = number(scores, "memorisation", "forget", "answer_probability")
    if generated is None or probability is None:
        return False
    return generated < LIKELY_PROBABILITY < probability


def has_forgotten(scores: Any, before: Any = None) -> str:
    """Whether the model forgot the forget set."""
    cells, cells_at_start = judged_cells(scores, "forget"), cells_before(scores, before, "forget")
    if not cells:
        return UNKNOWN

    answers = [value for name, value in cells.items() if name.endswith("knowledge")]
    texts = [value for name, value in cells.items() if not name.endswith("knowledge")]
    answers_gone = max([*answers, leaked_answers(scores)[0]]) <= MAX_ANSWERS_LEFT
    if answers_gone and max([*texts, 0.0]) <= MAX_TEXT_LEFT and not hides_answers(scores):
        return YES

    after, start = mean({name: cells[name] for name in cells_at_start or cells}), mean(cells_at_start)
    assert after is not None
    if knew_nothing(scores, before):
        return PARTLY  # what little there is was not there to be forgotten
    return NO if after > REMEMBERED_SHARE * (1.0 if start is None else start) + ROUNDING else PARTLY


def knew_nothing(scores: Any, before: Any = None) -> bool:
    """Whether the model before, if it is known, did not reproduce the forget set either, so nothing was forgotten."""
    cells = cells_before(scores, before, "forget")
    limits = {name: MAX_ANSWERS_LEFT if name.endswith("knowledge") else MAX_TEXT_LEFT for name in cells}
    return bool(cells) and all(value <= limits[name] for name, value in cells.items())


def has_retained(scores: Any, before: Any = None) -> str:
    """Whether the model retained the retain set; without a model before, unknown unless every retain cell is high."""
    cells, cells_at_start = judged_cells(scores, "retain"), cells_before(scores, before, "retain")
    if not cells_at_start:
        return YES if cells and min(cells.values()) >= HIGH_CELL else UNKNOWN

    after, start = mean({name: cells[name] for name in cells_at_start}), mean(cells_at_start)
    assert after is not None and start is not None
    if start <= ROUNDING:
        return UNKNOWN  # there was nothing to lose
    every_cell = all(cells[name] >= RETAINED_CELL * value - ROUNDING for name, value in cells_at_start.items())
    if after >= RETAINED_MEAN * start - ROUNDING and every_cell:
        return YES
    return PARTLY if after >= PARTLY_RETAINED_MEAN * start - ROUNDING else NO


def looks_unseen(scores: Any) -> str:
    """Whether no membership attack can tell forgotten documents from unseen ones."""
    tests = membership_tests(scores)
    if any(test.is_conspicuous for test in tests):
        return NO
    if any(test.interval is None for test in tests) or len({test.attack for test in tests}) < 2:
        # Older scores: the loss attack alone is enough to say no, but others may identify members that it does not.
        score, low = number(scores, "membership", "score"), number(scores, "membership", "perfect_score_5th_percentile")
        has_interval = any(test.interval is not None for test in tests)
        return NO if not has_interval and score is not None and low is not None and score < low else UNKNOWN
    return YES


def degenerate_excess(scores: Any, split: str) -> float | None:
    """By how much the share of degenerate outputs of a split exceeds the normal one.

    Normal is the share among the split's true answers, which may be lists or code, and for forget prompts also the
    share among the retain outputs of the same model. None if it was not measured.
    """
    share, retain = (number(scores, "outputs", name, "degenerate_text") for name in (split, "retain"))
    answers = number(scores, "outputs", split, "degenerate_answer")
    if share is None or retain is None or answers is None:
        return None
    return share - (answers if split == "retain" else max(answers, retain))


def degenerate_before(scores: Any, before: Any) -> float | None:
    """Share of degenerate retain outputs of the model before, if it is known."""
    after = number(scores, "outputs", "retain", "degenerate_text")
    return None if after is None else value_before(scores, before, after, "outputs", "retain", "degenerate_text")


def is_too_many(excess: float | None) -> bool:
    """Whether an excess of degenerate outputs is more than a working model has."""
    return excess is not None and excess >= MAX_DEGENERATE - ROUNDING


def broken_reasons(scores: Any, before: Any = None) -> list[str]:
    """Why the model is broken as a language model, judged by its outputs on retain prompts and by unseen text."""
    reasons = []
    share, start = number(scores, "outputs", "retain", "degenerate_text"), degenerate_before(scores, before)
    worse = start is None or share is None or is_too_many(share - start)
    if share is not None and is_too_many(degenerate_excess(scores, "retain")) and worse:
        was = "" if start is None else f" ({100 * start:.0f} % before)"
        reasons.append(f"{100 * share:.0f} % of its outputs on retain prompts are degenerate text{was}")

    uniform, entropy = number(scores, "uniform_nll"), number(scores, "outputs", "retain", "entropy")
    if uniform is not None and entropy is not None and entropy >= NOISE_SHARE * uniform:
        reasons.append("on the true retain answers it is as uncertain as a uniform guess")

    reasons += _broken_losses(scores, before, uniform)
    if not reasons and share is None and isinstance(scores, Mapping) and scores.get("broken") is True:
        reasons.append("its scores, which are of an older version, say so")
    return reasons


def _broken_losses(scores: Any, before: Any, uniform: float | None) -> list[str]:
    """What is wrong with the loss of unseen text."""
    held, nonmember = number(scores, "held_nll"), number(scores, "nonmember_nll")
    unseen = nonmember if held is None else held
    if unseen is None:
        return []
    reasons = []
    if uniform is not None and unseen >= NOISE_SHARE * uniform and unseen >= uniform - 1:
        reasons.append(f"its loss on unseen text is {unseen:.2f} nats per token, a uniform guess's is {uniform:.2f}")

    after, start = _losses_of_both(scores, before, unseen)
    if after is not None and start is not None and after - start > MAX_LOSS_INCREASE * start + ROUNDING:
        reasons.append(f"its loss on unseen text is {after - start:.2f} nats per token higher than before")
    return reasons


def _losses_of_both(scores: Any, before: Any, unseen: float) -> tuple[float | None, float | None]:
    """The loss after and before of the same unseen text, of which both are None if they are not known."""
    for name in ("held_nll", "nonmember_nll"):
        after, start = number(scores, name), number(before, name)
        if after is not None and start is not None:
            return after, round(start, DIGITS)
    change = number(scores, "difference", "unseen_nll", "difference")
    return (None, None) if change is None else (unseen, round(unseen - change, DIGITS))


def writes_sensibly(scores: Any, before: Any = None) -> str:
    """Whether the model still writes text; partly if it does not on forget prompts, or did not before either."""
    if broken_reasons(scores, before):
        return NO
    excesses = [degenerate_excess(scores, split) for split in ("forget", "retain")]
    if any(map(is_too_many, excesses)):
        return PARTLY
    return UNKNOWN if None in excesses else YES
