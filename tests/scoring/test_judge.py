"""The verdict's sentences and the report's signs never contradict each other, whatever the scores."""

from hypothesis import given
from hypothesis import strategies as st

from neko_lean.reporting.judge import judge_model as report
from neko_lean.scoring.judge import NO, UNKNOWN, YES, has_forgotten, has_retained, looks_unseen
from neko_lean.scoring.task import CELLS, task_aggregate
from neko_lean.scoring.verdict import verdict

SHARE = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.5, 0.8, 0.9, 0.95, 1.0]))
BOTH = ("forget", "retain")


@st.composite
def some_scores(draw):
    """Scores with any values, with or without a model before, membership and cells for any script."""
    cells = {cell: draw(st.one_of(SHARE, st.just(None))) if draw(st.booleans()) else draw(SHARE) for cell in CELLS}
    seen = {cell: None if value is None else draw(SHARE) for cell, value in cells.items()}
    scores = {"cells": cells, "task_aggregate": task_aggregate(cells), "mmlu": None, "attacks": {}, "held_nll": None}
    scores["missing_cells"] = [cell for cell, value in cells.items() if value is None]
    if draw(st.booleans()):
        scores["unicode_cells"] = seen
    forms = {"contained": draw(SHARE), "alphanumeric": draw(SHARE), "digits": draw(st.one_of(SHARE, st.none()))}
    scores["leaks"] = {"forget": forms, "retain": forms}
    scores["memorisation"] = {split: {"answer_probability": draw(st.one_of(SHARE, st.none()))} for split in BOTH}
    wrote = {split: {"degenerate": draw(SHARE), "repetition": draw(SHARE), "entropy": 1.0} for split in BOTH}
    scores |= {"outputs": wrote, "uniform_nll": 6.0, "nonmember_nll": draw(st.floats(0, 7)), "membership": None}
    if draw(st.booleans()):
        ends, two = sorted([draw(SHARE), draw(SHARE)]), sorted([draw(SHARE), draw(SHARE)])
        loss = {"two_sided_auc_interval": two}
        scores["membership"] = {
            "auc": sum(ends) / 2, "auc_interval": ends, "two_sided_auc": sum(two) / 2,
            "attacks": {"all": {"loss": loss}},
        }  # fmt: skip
    scores["difference"] = None
    if draw(st.booleans()):
        change = {f"{where}.{cell}": {"difference": value - draw(SHARE)} for where in ("cells", "unicode_cells")
                  for cell, value in scores.get(where, {}).items() if value is not None}  # fmt: skip
        scores["difference"] = {"before": "target", **change}
    return scores


@given(some_scores(), st.one_of(st.none(), some_scores()))
def test_the_verdict_and_the_report_never_contradict_each_other(scores, before):
    sentences = verdict(scores)
    text = "\n".join(sentences)
    scores = {**scores, "verdict": sentences, "broken": any(one.startswith("BROKEN") for one in sentences)}
    gone, rest, unseen, well = (sign.state for sign in report(scores, before).signs)
    assert ("It preserved the retain set" not in text) or rest == YES
    assert ("It lost" not in text) or rest in ("partly", NO)
    assert ("It lost most" not in text) or rest == NO
    if (
        scores["difference"] is not None or rest == UNKNOWN
    ):  # else the report knows of a model before, the verdict does not
        assert (rest == YES) == ("It preserved the retain set" in text)
        assert (rest == NO) == ("It lost most" in text)
    assert ("It forgot little or nothing" not in text) or gone == NO
    assert not (gone == YES and any(word in text for word in ("LEAKS", "HIDDEN", "It forgot little or nothing")))
    assert ("still recognizes" in text or "conspicuously above" in text or "TWO-SIDED" in text) == (unseen == NO)
    assert ("cannot tell forgotten documents" in text) == (unseen == YES)
    assert ("BROKEN" in text) == (well == NO)
    assert not ("GIBBERISH" in text and well == YES)


def test_a_lower_cell_is_a_loss_with_and_without_a_difference():
    cells = {cell: 0.0 if cell.startswith("forget") else 1.0 for cell in CELLS} | {"retain.Task1.knowledge": 0.8}
    full = {"cells": dict.fromkeys(CELLS, 1.0)}
    change = {f"cells.{cell}": {"difference": value - 1.0} for cell, value in cells.items()}
    scores = {"cells": cells, "difference": change}
    assert has_retained(scores) == has_retained({"cells": cells}, full) == "partly" and has_forgotten(scores) == YES
    assert has_retained({"cells": cells}) == UNKNOWN and looks_unseen(scores) == UNKNOWN
    same = {**scores, "difference": {**change, "cells.retain.Task1.knowledge": {"difference": 0.0}}}
    assert has_retained(same) == YES  # it was as low before


def test_cells_for_any_script_are_judged_if_they_exist():
    blind = dict.fromkeys(CELLS, 0.0)
    seen = {"cells": blind, "unicode_cells": dict.fromkeys(CELLS, 1.0)}
    assert has_forgotten({"cells": blind}) == YES and has_forgotten(seen) == NO and has_retained(seen) == YES
