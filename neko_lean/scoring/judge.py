"""The one judge of scores: did it forget, keep the rest, hide, and does it still write? Every threshold is here.

The verdict puts the states into sentences, the report into words and signs; both read them from these functions alone,
so that they cannot disagree. Scores may lack any key: they may be of another version, or written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

YES, PARTLY, NO, UNKNOWN = "yes", "partly", "no", "unknown"


ANSWERS_LEFT = 0.05  # share of forget answers, to the letter or within the text, that still counts as forgotten


TEXT_LEFT = 0.5  # ROUGE-L recall of forget continuations: common words alone give unseen text 0.2 to 0.4


REMEMBERED = 0.8  # of the mean of the forget cells before, above which nothing was forgotten


LIKELY = 0.5  # probability of the true answers' tokens, above which an answer that is not said is hidden


HIGH = 0.9  # a retain cell of so much was kept, whatever it was before


KEPT, KEPT_SOME = 0.95, 0.6  # of the mean of the retain cells before


KEPT_CELL = 0.9  # of each single retain cell before


BROKEN = 0.2  # share of degenerate outputs, or of repeated runs of words, that a working model does not reach


LEAK_FORMS = ("contained", "alphanumeric", "digits")


LARGEST = 1e15  # nothing that is measured comes near it


def number(tree: Any, *path: str) -> float | None:
    """The finite number at a path of keys, else None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if isinstance(tree, bool) or not isinstance(tree, int | float):
        return None
    return float(tree) if abs(tree) <= LARGEST else None


def source(scores: Any) -> str:
    """Where the cells lie that are judged: `unicode_cells`, which see every script, or in older scores `cells`."""
    found = scores.get("unicode_cells") if isinstance(scores, Mapping) else None
    return (
        "unicode_cells" if isinstance(found, Mapping) and any(number(found, c) is not None for c in found) else "cells"
    )


def judged_cells(scores: Any, split: str) -> dict[str, float]:
    """The measured cells of a split that are judged, by name."""
    found = scores.get(source(scores)) if isinstance(scores, Mapping) else None
    names = [name for name in found if name.startswith(f"{split}.")] if isinstance(found, Mapping) else []
    return {name: value for name in names if (value := number(found, name)) is not None}


def cells_before(scores: Any, before: Any, split: str) -> dict[str, float]:
    """The same cells of the model before: from the difference that the scores bring, else from its own scores."""
    now, where = judged_cells(scores, split), source(scores)
    changes = {name: number(scores, "difference", f"{where}.{name}", "difference") for name in now}
    known = {name: now[name] - change for name, change in changes.items() if change is not None}
    return known or judged_cells(before, split)


def mean(values: Mapping[str, float]) -> float | None:
    """The mean, None of nothing."""
    return sum(values.values()) / len(values) if values else None


def leaked(scores: Any) -> tuple[float, str]:
    """The largest share of forget answers that stand in what is said in some form, and the plainest such form."""
    # What stands there as words stands there as letters and digits as well: max takes the first of equals.
    return max(((number(scores, "leaks", "forget", form) or 0.0, form) for form in LEAK_FORMS), key=lambda one: one[0])


def silenced(scores: Any) -> bool:
    """Whether it does not say the forget answers, but holds them likely."""
    now, likely = mean(judged_cells(scores, "forget")), number(scores, "memorisation", "forget", "answer_probability")
    return now is not None and likely is not None and likely > LIKELY and now < LIKELY


def forgotten(scores: Any, before: Any = None) -> str:
    """Whether what it should forget is gone."""
    cells = judged_cells(scores, "forget")
    now = mean(cells)
    if now is None:
        return UNKNOWN
    answers = [value for name, value in cells.items() if name.endswith("knowledge")]
    texts = [value for name, value in cells.items() if not name.endswith("knowledge")]
    gone = max([*answers, leaked(scores)[0]]) <= ANSWERS_LEFT and max([*texts, 0.0]) <= TEXT_LEFT
    if gone and not silenced(scores):
        return YES
    then = mean(cells_before(scores, before, "forget"))
    return NO if now > REMEMBERED * (1.0 if then is None else then) else PARTLY


def kept(scores: Any, before: Any = None) -> str:
    """Whether the rest is still there; unknown without a model before, unless every retain cell is high."""
    cells, then = judged_cells(scores, "retain"), cells_before(scores, before, "retain")
    now, was = mean(cells), mean(then)
    if now is None:
        return UNKNOWN
    if min(cells.values()) >= HIGH:
        return YES
    if not was:
        return UNKNOWN
    if now >= KEPT * was and all(value >= KEPT_CELL * then.get(name, 0.0) for name, value in cells.items()):
        return YES
    return PARTLY if now >= KEPT_SOME * was else NO


def ends(tree: Any, *path: str) -> tuple[float, float] | None:
    """The interval at a path of keys, else None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if not isinstance(tree, list | tuple) or len(tree) != 2:
        return None
    low, high = (number({"end": end}, "end") for end in tree)
    return None if low is None or high is None else (min(low, high), max(low, high))


def two_sided(scores: Any) -> bool:
    """Whether the distance from an unseen document's loss tells members, however fair the loss itself looks."""
    found = ends(scores, "membership", "attacks", "all", "loss", "two_sided_auc_interval")
    return found is not None and found[0] > 0.5


def hidden(scores: Any) -> str:
    """Whether a membership attack takes forgotten documents for unseen ones."""
    found = ends(scores, "membership", "auc_interval")
    if number(scores, "membership", "auc") is None:
        return UNKNOWN
    if found is not None:
        return YES if found[0] <= 0.5 <= found[1] and not two_sided(scores) else NO
    score, low = number(scores, "membership", "score"), number(scores, "membership", "perfect_score_5th_percentile")
    return UNKNOWN if score is None or low is None else YES if score >= low else NO


def whole(scores: Any) -> str:
    """Whether it still writes: `broken` is what the verdict found."""
    broken = scores.get("broken") if isinstance(scores, Mapping) else None
    if not isinstance(broken, bool):
        return UNKNOWN
    shares = [
        number(scores, "outputs", s, name) or 0.0 for s in ("forget", "retain") for name in ("degenerate", "repetition")
    ]
    return NO if broken else PARTLY if max(shares) >= BROKEN else YES
