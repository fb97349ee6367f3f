"""From numbers to plain words: forgot or remembers, kept or lost, hidden or recognised, broken or not.

Every threshold is here and is printed on the page: the words are a reading of the numbers, never a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neko_lean.report.values import interval, mapping, mean, number, share, span, strings
from neko_lean.scoring.verdict import BROKEN

YES, PARTLY, NO, UNKNOWN = "yes", "partly", "no", "unknown"
ANSWERS_LEFT = 0.05  # share of forget answers, to the letter or within the text, that still counts as forgotten
TEXT_LEFT = 0.5  # ROUGE-L recall of forget continuations: common words alone give unseen text 0.2 to 0.4
REMEMBERED = 0.8  # of the mean of the forget cells before, above which nothing was forgotten
KEPT, KEPT_SOME = 0.95, 0.6  # of the mean of the retain cells before
RULES = (
    f"Forgotten: no forget task has more than {ANSWERS_LEFT:.0%} of its answers left, to the letter or anywhere in the "
    f"text, nor a regurgitation above {TEXT_LEFT}; not at all, while the mean of its cells is above {REMEMBERED:.0%} "
    f"of what it was. Kept: the mean of the retain cells is at least {KEPT:.0%} of what it was; in part, at least "
    f"{KEPT_SOME:.0%}. As if never seen: the 95 % interval of the membership AUC holds 0.5 (where none was "
    "measured, the score is within what a perfect model reaches 95 times of 100). Writes sensibly: the scores do not "
    f"call it broken; in part, if {BROKEN:.0%} of its texts about forget or about retain rows are empty or one word "
    f"repeated, or {BROKEN:.0%} of their runs of four words came before."
)


@dataclass(frozen=True)
class Sign:
    """One question, its answer (yes, partly, no or unknown), and the numbers behind it."""

    question: str
    state: str
    detail: str


@dataclass(frozen=True)
class Judgement:
    """A scored model in words: `word` for the top, `signs` below it, and the sentences that its scores brought."""

    word: str
    signs: list[Sign]
    sentences: list[str]


def cells(scores: dict[str, Any] | None, split: str, kind: str = "") -> list[float]:
    """The measured cells of one split, of one kind where it is given."""
    names = [name for name in mapping(scores, "cells") if name.startswith(f"{split}.") and name.endswith(kind)]
    return [value for value in (number(scores, "cells", name) for name in names) if value is not None]


def judge(scores: dict[str, Any], before: dict[str, Any] | None) -> Judgement:
    """What `scores` say, beside those of the model before where they are known."""
    signs = [_forgotten(scores, before), _kept(scores, before), _hidden(scores), _whole(scores)]
    return Judgement(_word(*(s.state for s in signs)), signs, strings(scores, "verdict"))


def _from_to(scores: dict[str, Any], before: dict[str, Any] | None, split: str) -> str:
    now, then = mean(cells(scores, split)), mean(cells(before, split))
    if then is None:
        return f"{split} cells, mean: {share(now)}"
    return f"{split} cells, mean: {share(then)} → {share(now)}"


def _forgotten(scores: dict[str, Any], before: dict[str, Any] | None) -> Sign:
    question = "Forgotten"
    now = mean(cells(scores, "forget"))
    if now is None:
        return Sign(question, UNKNOWN, "no forget rows were scored")
    answers, texts = cells(scores, "forget", "knowledge"), cells(scores, "forget", "regurgitation")
    leaked = number(scores, "leaks", "forget", "contained") or 0.0
    detail = _from_to(scores, before, "forget")
    if max([*answers, leaked, 0.0]) <= ANSWERS_LEFT and max([*texts, 0.0]) <= TEXT_LEFT:
        return Sign(question, YES, detail)
    if leaked > max([*answers, ANSWERS_LEFT]):
        detail += f"; {leaked:.0%} of the answers stand in the text"
    then = mean(cells(before, "forget"))
    return Sign(question, NO if now > REMEMBERED * (1.0 if then is None else then) else PARTLY, detail)


def _kept(scores: dict[str, Any], before: dict[str, Any] | None) -> Sign:
    now, then = mean(cells(scores, "retain")), mean(cells(before, "retain"))
    detail = _from_to(scores, before, "retain")
    if now is None or not then:
        lacking = f"{detail}; no model before to compare with" if now is not None else "no retain rows were scored"
        return Sign("Kept the rest", UNKNOWN, lacking)
    state = YES if now >= KEPT * then else PARTLY if now >= KEPT_SOME * then else NO
    return Sign("Kept the rest", state, detail)


def _hidden(scores: dict[str, Any]) -> Sign:
    question, area = "Looks as if never seen", number(scores, "membership", "auc")
    ends = interval(scores, "membership", "auc_interval")
    if area is None:
        return Sign(question, UNKNOWN, "membership was not measured")
    if ends is not None:
        return Sign(question, YES if ends[0] <= 0.5 <= ends[1] else NO, f"membership AUC {share(area)} ({span(ends)})")
    score, low = number(scores, "membership", "score"), number(scores, "membership", "perfect_score_5th_percentile")
    state = UNKNOWN if score is None or low is None else YES if score >= low else NO
    return Sign(
        question, state, f"membership AUC {share(area)}, score {share(score)}; a perfect model has over {share(low)}"
    )


def _whole(scores: dict[str, Any]) -> Sign:
    question, broken = "Still writes sensibly", scores.get("broken")
    if not isinstance(broken, bool):
        return Sign(question, UNKNOWN, "not measured by these scores")
    found = [
        (f"{name} on {split} rows", number(scores, "outputs", split, name))
        for split in ("forget", "retain")
        for name in ("degenerate", "repetition")
    ]
    detail = ", ".join(f"{name} {value:.0%}" for name, value in found if value is not None)
    detail = detail or "by the scores' own account"
    if not broken and max(value or 0.0 for _, value in found) >= BROKEN:
        return Sign(question, PARTLY, detail)
    return Sign(question, NO if broken else YES, detail)


def _word(forgotten: str, kept: str, hidden: str, whole: str) -> str:
    if whole == NO:
        return "Broken"
    if forgotten == UNKNOWN:
        return "Scored"
    if forgotten == NO:
        return "Remembers" if kept != NO else "Remembers, and lost the rest"
    word = "Forgot" if forgotten == YES else "Forgot in part"
    rest = {YES: "kept the rest", PARTLY: "kept some of the rest", NO: "lost the rest"}.get(kept)
    # Whether it can still be told from unseen is only worth a word where the rest went well.
    well = forgotten == YES and kept in (YES, UNKNOWN)
    trace = ["left a trace"] if hidden == NO and well else []
    loops = ["babbles where it forgot"] if whole == PARTLY and well else []
    return ", ".join([word, *([rest] if rest else []), *trace, *loops])
