"""The phrase for a model, from numbers that a reader would judge the same way."""

import pytest

from neko_lean.reporting.judge import RULES, judge_model
from neko_lean.scoring.task import CELLS
from neko_lean.scoring.verdict import verdict
from tests.reporting.made import full_scores, old_scores

BEFORE = old_scores("target", 1.0)


def scored(forget, retain, **more):
    cells = {cell: forget if cell.startswith("forget") else retain for cell in CELLS}
    return {"model": "m", "cells": cells, **more}


@pytest.mark.parametrize(
    ("forget", "retain", "word"),
    [
        (0.0, 0.95, "Forgot, preserved the rest"),
        (0.0, 0.7, "Forgot, preserved some of the rest"),
        (0.0, 0.1, "Forgot, lost the rest"),
        (0.4, 0.95, "Forgot in part, preserved the rest"),
        (0.9, 0.95, "Remembers"),
        (0.9, 0.1, "Remembers, and lost the rest"),
    ],
)
def test_phrases(forget, retain, word):
    assert judge_model(scored(forget, retain), BEFORE).phrase == word


def test_leaked_answers_are_not_forgotten():
    leaks = {"forget": {"contained": 0.4}}
    found = judge_model(scored(0.0, 0.95, leaks=leaks), BEFORE)
    assert found.phrase == "Forgot in part, preserved the rest"
    assert "40 % of the answers occur in its outputs" in found.signs[0].detail


def test_trace_and_broken_model():
    trace = {"auc": 0.2, "auc_interval": [0.1, 0.3]}
    assert judge_model(scored(0.0, 0.95, membership=trace), BEFORE).phrase == "Forgot, preserved the rest, left a trace"
    hidden = {"auc": 0.6, "auc_interval": [0.45, 0.75]}
    assert judge_model(scored(0.0, 0.95, membership=hidden), BEFORE).phrase == "Forgot, preserved the rest"
    assert judge_model(scored(0.0, 0.95, broken=True), BEFORE).phrase == "Broken"


def test_without_scores_before_only_high_retain_cells_are_preserved():
    assert judge_model(scored(0.0, 0.95), None).phrase == "Forgot, preserved the rest"
    assert judge_model(scored(0.0, 0.8), None).phrase == "Forgot"
    assert judge_model({"model": "m"}, None).phrase == "Scored"


def test_sentences_are_computed_from_the_numbers_and_the_model_before():
    scores = {**full_scores("m", 0.02), "difference": None}
    assert judge_model(scores, BEFORE).sentences == verdict(scores, BEFORE) != verdict(scores)
    assert judge_model({**scores, "verdict": ["It lost everything."]}, BEFORE).sentences == verdict(scores, BEFORE)


def outputs(forget, retain):
    shares = {"forget": forget, "retain": retain}
    return {split: {"degenerate_text": share, "degenerate_answer": 0.0} for split, share in shares.items()}


def test_degenerate_outputs_are_not_sensible():
    found = judge_model(scored(0.0, 0.95, outputs=outputs(0.9, 0.0)), BEFORE)
    assert found.signs[3].state == "partly" and found.phrase.endswith("some degenerate outputs")
    assert found.signs[3].detail == "degenerate text: 90 % on forget rows, 0 % on retain rows"
    assert judge_model(scored(0.0, 0.95, outputs=outputs(0.9, 0.9)), BEFORE).phrase == "Broken"
    assert judge_model(scored(0.0, 0.95, outputs=outputs(0.0, 0.0)), BEFORE).signs[3].state == "yes"


def test_older_scores_do_not_say_whether_outputs_are_sensible():
    old = {"forget": {"degenerate": 0.0, "repetition": 0.0}, "retain": {"degenerate": 0.0, "repetition": 0.0}}
    sign = judge_model(scored(0.0, 0.95, broken=False, outputs=old), BEFORE).signs[3]
    assert (sign.state, sign.detail) == ("unknown", "not measured by these scores")


def test_membership_sign_names_the_strongest_attack():
    table = {
        name: {"auc": area, "auc_interval": [area - 0.04, area + 0.04]}
        for name, area in (("loss", 0.67), ("zlib", 0.95))
    }
    sign = judge_model(scored(0.0, 0.95, membership={"auc": 0.67, "attacks": {"all": table}}), BEFORE).signs[2]
    assert sign.state == "no" and sign.detail == "strongest membership attack (zlib): AUC 0.950 (0.90 to 1.00)"


def test_rules_name_the_thresholds():
    assert all(words in RULES for words in ("5%", "0.5", "80%", "95%", "60%"))
