"""From numbers to words: one phrase for each model, and four signs that explain it.

The answers come from `scoring.judge`, whose thresholds are printed on the page. The words are a reading of the numbers,
not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neko_lean.reporting.values import format_interval, format_number, strings
from neko_lean.scoring import (
    NO,
    PARTLY,
    UNKNOWN,
    YES,
    cells_before,
    interval,
    judge,
    judged_cells,
    mean,
    number,
)

RULES = (
    f"Forgotten: no forget task has more than {judge.MAX_ANSWERS_LEFT:.0%} of its answers left, to the letter or "
    f"anywhere in the text, no regurgitation is above {judge.MAX_TEXT_LEFT}, and the true answers do not have a "
    f"probability above {judge.LIKELY_PROBABILITY}. Not forgotten at all: the mean of the forget cells is above "
    f"{judge.REMEMBERED_SHARE:.0%} of what it was. Preserved the rest: every retain cell is at least "
    f"{judge.HIGH_CELL}, or their mean is at least {judge.RETAINED_MEAN:.0%} and each cell at least "
    f"{judge.RETAINED_CELL:.0%} of what it was; in part: the mean is at least {judge.PARTLY_RETAINED_MEAN:.0%}. "
    "Looks as if never seen: the 95 % interval of the membership AUC contains 0.5, and that of the two-sided AUC is "
    "not above it (if none was measured, the score is within what a perfect model reaches 95 times out of 100). Writes "
    f"sensibly: the scores do not call the model broken; in part: {judge.MAX_DEGENERATE:.0%} of its outputs on forget "
    f"or retain rows are empty or repeat one word, or {judge.MAX_DEGENERATE:.0%} of their four-word sequences are "
    "repeats. The cells are those for any script, if the scores have them."
)


@dataclass(frozen=True)
class Sign:
    """One question, its answer (yes, partly, no or unknown), and the numbers it is based on."""

    question: str
    state: str
    detail: str


@dataclass(frozen=True)
class Judgement:
    """A scored model in words: `phrase` as the heading, `signs` below it, and the verdict's sentences."""

    phrase: str
    signs: list[Sign]
    sentences: list[str]


def judge_model(scores: dict[str, Any], before: dict[str, Any] | None) -> Judgement:
    """Judge a scored model.

    Args:
        scores: its scores.json.
        before: scores.json of the model before unlearning, if known.
    """
    signs = [_forgetting(scores, before), _retention(scores, before), _membership(scores), _writing(scores)]
    return Judgement(_phrase(*(sign.state for sign in signs)), signs, strings(scores, "verdict"))


def _change_of_mean(scores: dict[str, Any], before: dict[str, Any] | None, split: str) -> str:
    after, start = mean(judged_cells(scores, split)), mean(cells_before(scores, before, split))
    if start is None:
        return f"{split} cells, mean: {format_number(after)}"
    return f"{split} cells, mean: {format_number(start)} → {format_number(after)}"


def _forgetting(scores: dict[str, Any], before: dict[str, Any] | None) -> Sign:
    state = judge.has_forgotten(scores, before)
    if state == UNKNOWN:
        return Sign("Forgotten", state, "no forget rows were scored")
    cells, leaked = judged_cells(scores, "forget"), judge.leaked_answers(scores)[0]
    answers = [value for name, value in cells.items() if name.endswith("knowledge")]
    detail = _change_of_mean(scores, before, "forget")
    if leaked > max([*answers, judge.MAX_ANSWERS_LEFT]):
        detail += f"; {leaked:.0%} of the answers occur in its outputs"
    if judge.hides_answers(scores):
        probability = format_number(number(scores, "memorisation", "forget", "answer_probability"))
        detail += f"; not generated, but the true answers have a probability of {probability}"
    return Sign("Forgotten", state, detail)


def _retention(scores: dict[str, Any], before: dict[str, Any] | None) -> Sign:
    state, detail = judge.has_retained(scores, before), _change_of_mean(scores, before, "retain")
    if state == UNKNOWN:
        measured = bool(judged_cells(scores, "retain"))
        detail = f"{detail}; no model before to compare with" if measured else "no retain rows were scored"
    return Sign("Preserved the rest", state, detail)


def _membership(scores: dict[str, Any]) -> Sign:
    question, state = "Looks as if never seen", judge.looks_unseen(scores)
    area, ends = number(scores, "membership", "auc"), interval(scores, "membership", "auc_interval")
    if area is None:
        return Sign(question, state, "membership was not measured")
    if ends is not None:
        two_sided = "; the two-sided AUC identifies members" if judge.is_two_sided(scores) else ""
        return Sign(question, state, f"membership AUC {format_number(area)} ({format_interval(ends)}){two_sided}")

    # Older scores have no interval.
    score, low = number(scores, "membership", "score"), number(scores, "membership", "perfect_score_5th_percentile")
    detail = f"membership AUC {format_number(area)}, score {format_number(score)}; a perfect model has over "
    return Sign(question, state, detail + format_number(low))


def _writing(scores: dict[str, Any]) -> Sign:
    question, state = "Still writes sensibly", judge.writes_sensibly(scores)
    if state == UNKNOWN:
        return Sign(question, state, "not measured by these scores")
    shares = [
        (f"{name} on {split} rows", number(scores, "outputs", split, name))
        for split in ("forget", "retain")
        for name in ("degenerate", "repetition")
    ]
    detail = ", ".join(f"{name} {share:.0%}" for name, share in shares if share is not None)
    return Sign(question, state, detail or "according to the scores")


def _phrase(forgotten: str, retained: str, unseen: str, writes: str) -> str:
    """The four states as one phrase."""
    if writes == NO:
        return "Broken"
    if forgotten == UNKNOWN:
        return "Scored"
    if forgotten == NO:
        return "Remembers" if retained != NO else "Remembers, and lost the rest"

    parts = ["Forgot" if forgotten == YES else "Forgot in part"]
    rest = {YES: "preserved the rest", PARTLY: "preserved some of the rest", NO: "lost the rest"}.get(retained)
    if rest:
        parts.append(rest)
    # Traces are only worth mentioning if the rest went well.
    if forgotten == YES and retained in (YES, UNKNOWN):
        if unseen == NO:
            parts.append("left a trace")
        if writes == PARTLY:
            parts.append("degenerate outputs on forget prompts")
    return ", ".join(parts)
