"""Four judgements of a scored model: did it forget, retain the rest, hide that it forgot, and does it still write?

All thresholds are here. The verdict's sentences and the report's signs both come from these functions, so they cannot
contradict each other. Scores may lack any key, because they may be of an older version or edited by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neko_lean.scoring.values import interval, mean, number

YES, PARTLY, NO, UNKNOWN = "yes", "partly", "no", "unknown"
# Forgotten: at most this share of forget answers is left, to the letter or within the text ...
MAX_ANSWERS_LEFT = 0.05
# ... and no regurgitation is above this ROUGE-L recall; common words alone give unseen text 0.2 to 0.4.
MAX_TEXT_LEFT = 0.5
# Not forgotten: the mean of the forget cells is above this share of what it was.
REMEMBERED_SHARE = 0.8
# Hidden: the true answers' tokens have a higher probability than this although the answers are not generated.
LIKELY_PROBABILITY = 0.5
# Retained: every retain cell is at least this, whatever it was before ...
HIGH_CELL = 0.9
# ... or the mean of the retain cells, and each single cell, are at least these shares of what they were.
RETAINED_MEAN, RETAINED_CELL = 0.95, 0.9
# Partly retained: the mean of the retain cells is at least this share of what it was.
PARTLY_RETAINED_MEAN = 0.6
# Degenerate: a working model stays below this share of degenerate outputs, and of repeated four-word sequences.
MAX_DEGENERATE = 0.2
LEAK_FORMS = ("contained", "alphanumeric", "digits")


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
    """The same cells before unlearning, from the differences in the scores or, without those, from `before`."""
    after, key = judged_cells(scores, split), cells_key(scores)
    changes = {name: number(scores, "difference", f"{key}.{name}", "difference") for name in after}
    known = {name: after[name] - change for name, change in changes.items() if change is not None}
    return known or judged_cells(before, split)


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
    cells = judged_cells(scores, "forget")
    after = mean(cells)
    if after is None:
        return UNKNOWN

    answers = [value for name, value in cells.items() if name.endswith("knowledge")]
    texts = [value for name, value in cells.items() if not name.endswith("knowledge")]
    answers_gone = max([*answers, leaked_answers(scores)[0]]) <= MAX_ANSWERS_LEFT
    if answers_gone and max([*texts, 0.0]) <= MAX_TEXT_LEFT and not hides_answers(scores):
        return YES

    start = mean(cells_before(scores, before, "forget"))
    return NO if after > REMEMBERED_SHARE * (1.0 if start is None else start) else PARTLY


def has_retained(scores: Any, before: Any = None) -> str:
    """Whether the model retained the retain set; unknown without scores before, unless every retain cell is high."""
    cells, cells_at_start = judged_cells(scores, "retain"), cells_before(scores, before, "retain")
    after, start = mean(cells), mean(cells_at_start)
    if after is None:
        return UNKNOWN
    if min(cells.values()) >= HIGH_CELL:
        return YES
    if not start:
        return UNKNOWN

    every_cell = all(value >= RETAINED_CELL * cells_at_start.get(name, 0.0) for name, value in cells.items())
    if after >= RETAINED_MEAN * start and every_cell:
        return YES
    return PARTLY if after >= PARTLY_RETAINED_MEAN * start else NO


def is_two_sided(scores: Any) -> bool:
    """Whether the distance from an unseen document's loss identifies members, whatever the AUC of the loss."""
    ends = interval(scores, "membership", "attacks", "all", "loss", "two_sided_auc_interval")
    return ends is not None and ends[0] > 0.5


def looks_unseen(scores: Any) -> str:
    """Whether a membership attack cannot tell forgotten documents from unseen ones."""
    if number(scores, "membership", "auc") is None:
        return UNKNOWN
    ends = interval(scores, "membership", "auc_interval")
    if ends is not None:
        return YES if ends[0] <= 0.5 <= ends[1] and not is_two_sided(scores) else NO

    # Older scores have no interval.
    score, low = number(scores, "membership", "score"), number(scores, "membership", "perfect_score_5th_percentile")
    if score is None or low is None:
        return UNKNOWN
    return YES if score >= low else NO


def writes_sensibly(scores: Any) -> str:
    """Whether the model still writes text; `broken` in the scores is what the verdict found."""
    broken = scores.get("broken") if isinstance(scores, Mapping) else None
    if not isinstance(broken, bool):
        return UNKNOWN
    if broken:
        return NO
    shares = [
        number(scores, "outputs", split, name) or 0.0
        for split in ("forget", "retain")
        for name in ("degenerate", "repetition")
    ]
    return PARTLY if max(shares) >= MAX_DEGENERATE else YES
