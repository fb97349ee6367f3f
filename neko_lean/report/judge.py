"""From numbers to plain words: forgot or remembers, kept or lost, hidden or recognised, broken or not.

The states are `scoring.judge`'s, whose thresholds are printed on the page: the words are a reading of the numbers,
never a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neko_lean.report.values import interval, number, share, span, strings
from neko_lean.scoring import NO, PARTLY, UNKNOWN, YES, cells_before, judged_cells, mean
from neko_lean.scoring import judge as judged

RULES = (
    f"Forgotten: no forget task has more than {judged.ANSWERS_LEFT:.0%} of its answers left, to the letter or anywhere "
    f"in the text, nor a regurgitation above {judged.TEXT_LEFT}, and the true answers are not likely all the same "
    f"(above {judged.LIKELY}); not at all, while the mean of its cells is above {judged.REMEMBERED:.0%} of what it "
    "was. "
    f"Kept: every retain cell is at least {judged.HIGH}, or their mean {judged.KEPT:.0%} of what it was and none below "
    f"{judged.KEPT_CELL:.0%}; in part, the mean at least {judged.KEPT_SOME:.0%}. As if never seen: the 95 % interval "
    "of the membership AUC holds 0.5, and that of the distance from unseen documents does not lie above it (where none "
    "was measured, the score is within what a perfect model reaches 95 times of 100). Writes sensibly: the scores do "
    f"not call it broken; in part, if {judged.BROKEN:.0%} of its texts about forget or about retain rows are empty or "
    f"one word repeated, or {judged.BROKEN:.0%} of their runs of four words came before. Cells are those that see "
    "every script, where the scores have them."
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


def judge(scores: dict[str, Any], before: dict[str, Any] | None) -> Judgement:
    """What `scores` say, beside those of the model before where they are known."""
    signs = [_forgotten(scores, before), _kept(scores, before), _hidden(scores), _whole(scores)]
    return Judgement(_word(*(s.state for s in signs)), signs, strings(scores, "verdict"))


def _from_to(scores: dict[str, Any], before: dict[str, Any] | None, split: str) -> str:
    now, then = mean(judged_cells(scores, split)), mean(cells_before(scores, before, split))
    if then is None:
        return f"{split} cells, mean: {share(now)}"
    return f"{split} cells, mean: {share(then)} → {share(now)}"


def _forgotten(scores: dict[str, Any], before: dict[str, Any] | None) -> Sign:
    state = judged.forgotten(scores, before)
    if state == UNKNOWN:
        return Sign("Forgotten", state, "no forget rows were scored")
    cells, leak = judged_cells(scores, "forget"), judged.leaked(scores)[0]
    answers = [value for name, value in cells.items() if name.endswith("knowledge")]
    detail = _from_to(scores, before, "forget")
    if leak > max([*answers, judged.ANSWERS_LEFT]):
        detail += f"; {leak:.0%} of the answers stand in the text"
    if judged.silenced(scores):
        likely = share(number(scores, "memorisation", "forget", "answer_probability"))
        detail += f"; not said, but the true answers have a probability of {likely}"
    return Sign("Forgotten", state, detail)


def _kept(scores: dict[str, Any], before: dict[str, Any] | None) -> Sign:
    state, detail = judged.kept(scores, before), _from_to(scores, before, "retain")
    if state == UNKNOWN:
        measured = bool(judged_cells(scores, "retain"))
        detail = f"{detail}; no model before to compare with" if measured else "no retain rows were scored"
    return Sign("Kept the rest", state, detail)


def _hidden(scores: dict[str, Any]) -> Sign:
    question, state = "Looks as if never seen", judged.hidden(scores)
    area, ends = number(scores, "membership", "auc"), interval(scores, "membership", "auc_interval")
    if area is None:
        return Sign(question, state, "membership was not measured")
    if ends is not None:
        apart = "; the distance from unseen documents tells" if judged.two_sided(scores) else ""
        return Sign(question, state, f"membership AUC {share(area)} ({span(ends)}){apart}")
    score, low = number(scores, "membership", "score"), number(scores, "membership", "perfect_score_5th_percentile")
    return Sign(
        question, state, f"membership AUC {share(area)}, score {share(score)}; a perfect model has over {share(low)}"
    )


def _whole(scores: dict[str, Any]) -> Sign:
    question, state = "Still writes sensibly", judged.whole(scores)
    if state == UNKNOWN:
        return Sign(question, state, "not measured by these scores")
    found = [
        (f"{name} on {split} rows", number(scores, "outputs", split, name))
        for split in ("forget", "retain")
        for name in ("degenerate", "repetition")
    ]
    detail = ", ".join(f"{name} {value:.0%}" for name, value in found if value is not None)
    return Sign(question, state, detail or "by the scores' own account")


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
