"""From numbers to words: one phrase for each model, and four signs that explain it.

The answers and sentences come from `scoring`, whose thresholds are printed on the page. They are computed anew from the
numbers and the model before, so that scores of any version get the same words. The words are a reading of the numbers,
not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neko_lean.reporting.values import format_interval, format_number
from neko_lean.scoring import (
    NO,
    PARTLY,
    UNKNOWN,
    YES,
    cells_before,
    judge,
    judged_cells,
    mean,
    number,
    percent,
    strongest_attack,
    verdict,
)

RULES = (
    f"Forgotten: at most {judge.MAX_ANSWERS_LEFT:.0%} of the answers of any forget group are left, to the letter or "
    f"anywhere in the text, no regurgitation is above {judge.MAX_TEXT_LEFT}, and the true answers do not have a "
    f"probability above {judge.LIKELY_PROBABILITY}. Not forgotten at all: the mean of the forget cells is above "
    f"{judge.REMEMBERED_SHARE:.0%} of what it was. Preserved the rest: the mean of the retain cells is at least "
    f"{judge.RETAINED_MEAN:.0%} and each cell at least {judge.RETAINED_CELL:.0%} of what it was; in part: the mean is "
    f"at least {judge.PARTLY_RETAINED_MEAN:.0%}. Without scores of the model before, only retain cells that are all at "
    f"least {judge.HIGH_CELL} count as preserved. Looks as if never seen: for every membership attack, the interval of "
    "the AUC contains 0.5, and that of the two-sided AUC is not above it; the 95 % intervals are widened for the "
    "number of attacks. Writes sensibly: the share of degenerate text (empty, unreadable, loops or fragments) among "
    f"its outputs is less than {judge.MAX_DEGENERATE:.0%} above that among the true answers, and on forget prompts "
    "above that on retain prompts; in part: it is more on forget prompts, or was about as high before; not: it is "
    f"more on retain prompts, or the loss of unseen text is that of a uniform guess or rose by "
    f"{judge.MAX_LOSS_INCREASE:.0%}. The cells are those for any script, if the scores have them."
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
    signs = [_forgetting(scores, before), _retention(scores, before), _membership(scores), _writing(scores, before)]
    return Judgement(_phrase(*(sign.state for sign in signs)), signs, verdict(scores, before))


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
        detail += f"; {percent(leaked)} of the answers occur in its outputs"
    if state == YES and judge.knew_nothing(scores, before):
        detail += "; the model before did not know them either"
    if judge.hides_answers(scores):
        probability = format_number(number(scores, "memorisation", "forget", "answer_probability"))
        detail += f"; not generated, but the true answers have a probability of {probability}"
    return Sign("Forgotten", state, detail)


def _retention(scores: dict[str, Any], before: dict[str, Any] | None) -> Sign:
    state, detail = judge.has_retained(scores, before), _change_of_mean(scores, before, "retain")
    if state == UNKNOWN:
        if not judged_cells(scores, "retain"):
            detail = "no retain rows were scored"
        elif not cells_before(scores, before, "retain"):
            detail = f"{detail}; no model before to compare with"
    return Sign("Preserved the rest", state, detail)


def _membership(scores: dict[str, Any]) -> Sign:
    question, state, strongest = "Looks as if never seen", judge.looks_unseen(scores), strongest_attack(scores)
    if strongest is None:
        return Sign(question, state, "membership was not measured")
    ends = "" if strongest.interval is None else f" ({format_interval(strongest.interval)})"
    detail = f"strongest membership attack ({strongest.label}): AUC {format_number(strongest.value)}{ends}"
    if state == UNKNOWN:
        detail += "; other attacks or their intervals were not measured"
    return Sign(question, state, detail)


def _writing(scores: dict[str, Any], before: dict[str, Any] | None) -> Sign:
    question, state = "Still writes sensibly", judge.writes_sensibly(scores, before)
    if state == UNKNOWN:
        return Sign(question, state, "not measured by these scores")
    shares = [(split, number(scores, "outputs", split, "degenerate_text")) for split in ("forget", "retain")]
    known = [f"{percent(share)} on {split} rows" for split, share in shares if share is not None]
    reasons = judge.broken_reasons(scores, before)
    return Sign(question, state, "; ".join([*([f"degenerate text: {', '.join(known)}"] if known else []), *reasons]))


def _phrase(forgotten: str, retained: str, unseen: str, writes: str) -> str:
    """The four states as one phrase."""
    if writes == NO:
        return "Broken"
    if forgotten == UNKNOWN:
        return "Scored"
    if forgotten == NO:
        return {NO: "Remembers, and lost the rest", PARTLY: "Remembers, and lost some of the rest"}.get(
            retained, "Remembers"
        )

    parts = ["Forgot" if forgotten == YES else "Forgot in part"]
    rest = {YES: "preserved the rest", PARTLY: "preserved some of the rest", NO: "lost the rest"}.get(retained)
    if rest:
        parts.append(rest)
    # Traces are only worth mentioning if the rest went well.
    if forgotten == YES and retained in (YES, UNKNOWN):
        if unseen == NO:
            parts.append("left a trace")
        if writes == PARTLY:
            parts.append("some degenerate outputs")
    return ", ".join(parts)
