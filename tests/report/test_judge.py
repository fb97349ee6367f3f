"""The words at the top, from numbers of which a reader would say the same."""

import pytest

from neko_lean.report.judge import RULES, judge
from neko_lean.scoring.task import CELLS
from tests.report.made import full_scores, old_scores

BEFORE = old_scores("target", 1.0)


def scored(forget, retain, **more):
    cells = {cell: forget if cell.startswith("forget") else retain for cell in CELLS}
    return {"model": "m", "cells": cells, **more}


@pytest.mark.parametrize(
    ("forget", "retain", "word"),
    [
        (0.0, 0.95, "Forgot, kept the rest"),
        (0.0, 0.7, "Forgot, kept some of the rest"),
        (0.0, 0.1, "Forgot, lost the rest"),
        (0.4, 0.95, "Forgot in part, kept the rest"),
        (0.9, 0.95, "Remembers"),
        (0.9, 0.1, "Remembers, and lost the rest"),
    ],
)
def test_words(forget, retain, word):
    assert judge(scored(forget, retain), BEFORE).word == word


def test_a_leak_is_not_forgotten():
    leaks = {"forget": {"contained": 0.4}}
    found = judge(scored(0.0, 0.95, leaks=leaks), BEFORE)
    assert found.word == "Forgot in part, kept the rest"
    assert "40% of the answers stand in the text" in found.signs[0].detail


def test_a_trace_and_a_broken_model():
    trace = {"auc": 0.2, "auc_interval": [0.1, 0.3]}
    assert judge(scored(0.0, 0.95, membership=trace), BEFORE).word == "Forgot, kept the rest, left a trace"
    hidden = {"auc": 0.6, "auc_interval": [0.45, 0.75]}
    assert judge(scored(0.0, 0.95, membership=hidden), BEFORE).word == "Forgot, kept the rest"
    assert judge(scored(0.0, 0.95, broken=True), BEFORE).word == "Broken"


def test_without_a_model_before_only_high_retain_cells_were_kept_for_sure():
    assert judge(scored(0.0, 0.95), None).word == "Forgot, kept the rest"
    assert judge(scored(0.0, 0.8), None).word == "Forgot"
    assert judge({"model": "m"}, None).word == "Scored"


def test_the_scores_own_sentences_come_first():
    scores = full_scores("m", 0.02)
    assert judge(scores, BEFORE).sentences == scores["verdict"]
    older = judge({**scores, "verdict": None}, BEFORE)
    assert older.sentences == [] and older.signs[0].detail.startswith("forget cells, mean: ")


def test_texts_that_loop_are_not_sensible():
    loops = {"forget": {"degenerate": 0.9}, "retain": {"degenerate": 0.0}}
    sign = judge(scored(0.0, 0.95, broken=False, outputs=loops), BEFORE).signs[3]
    assert (sign.state, sign.detail) == ("partly", "degenerate on forget rows 90%, degenerate on retain rows 0%")
    babble = judge(scored(0.0, 0.95, broken=False, outputs={"forget": {"repetition": 0.4}}), BEFORE)
    assert babble.signs[3].state == "partly" and babble.word.endswith("babbles where it forgot")
    assert judge(scored(0.0, 0.95, broken=False), BEFORE).signs[3].state == "yes"


def test_the_rules_name_the_thresholds():
    assert all(words in RULES for words in ("5%", "0.5", "80%", "95%", "60%"))
