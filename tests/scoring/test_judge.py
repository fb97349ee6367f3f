"""The verdict's sentences, the report's signs and its phrase never contradict each other, whatever the scores."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from neko_lean.reporting.judge import judge_model
from neko_lean.scoring.judge import (
    NO,
    PARTLY,
    UNKNOWN,
    YES,
    broken_reasons,
    cells_before,
    has_forgotten,
    has_retained,
    writes_sensibly,
)
from neko_lean.scoring.task import CELLS, task_aggregate
from neko_lean.scoring.verdict import verdict

SHARE = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.004, 0.05, 0.5, 0.8, 0.9, 0.95, 1.0]))
BOTH = ("forget", "retain")
OTHER_CELLS = tuple(f"{split}.news.{name}" for split in BOTH for name in ("regurgitation", "knowledge"))
ATTACKS = ("loss", "zlib", "min_k_plus_plus")


@st.composite
def some_scores(draw, names):
    """Scores of these cells with any values, with or without membership, outputs and cells for any script."""
    cells = {cell: draw(st.one_of(SHARE, st.just(None)) if draw(st.booleans()) else SHARE) for cell in names}
    scores = {"cells": cells, "missing_cells": [cell for cell, value in cells.items() if value is None]}
    scores["task_aggregate"] = task_aggregate(cells) if names == CELLS else None
    if draw(st.booleans()):
        scores["unicode_cells"] = {cell: None if value is None else draw(SHARE) for cell, value in cells.items()}
    forms = {"contained": draw(SHARE), "alphanumeric": draw(SHARE), "digits": draw(st.one_of(SHARE, st.none()))}
    scores["leaks"] = {"forget": forms, "retain": forms}
    scores["memorisation"] = {split: {"answer_probability": draw(st.one_of(SHARE, st.none()))} for split in BOTH}
    scores["outputs"] = {
        split: {"entropy": 1.0, "degenerate_text": draw(SHARE), "degenerate_answer": draw(SHARE)}
        if draw(st.booleans())
        else {"degenerate": draw(SHARE), "repetition": draw(SHARE)}  # an older version
        for split in BOTH
    }
    scores |= {"broken": draw(st.booleans()), "uniform_nll": 6.0, "nonmember_nll": draw(st.floats(0, 7))}
    scores["membership"] = draw(st.one_of(st.none(), some_membership()))
    return scores


@st.composite
def some_membership(draw):
    """Membership numbers of all versions: of several attacks, of one, or without intervals."""
    table = {}
    for name in draw(st.sampled_from([ATTACKS, ("loss",), ()])):
        table[name] = {}
        for key in ("auc", "two_sided_auc"):
            low, value, high = sorted(draw(SHARE) for _ in range(3))
            table[name] |= {key: value}
            if draw(st.integers(0, 5)):
                table[name][f"{key}_interval"] = [low, high]
    block = {"auc": draw(SHARE), "score": draw(SHARE), "perfect_score_5th_percentile": 0.7}
    return {**block, "attacks": {"all": table}} if table else block


def differences(scores, before):
    """The block `difference` as `score --before` writes it."""
    changes = {"before": "target"}
    for block in ("cells", "unicode_cells"):
        for cell, value in scores.get(block, {}).items():
            start = before.get(block, {}).get(cell)
            if value is not None and start is not None:
                changes[f"{block}.{cell}"] = {"difference": value - start}
    shares = [scores["outputs"]["retain"].get("degenerate_text"), before["outputs"]["retain"].get("degenerate_text")]
    if None not in shares:
        changes["outputs.retain.degenerate_text"] = {"difference": shares[0] - shares[1]}
    changes["unseen_nll"] = {"difference": scores["nonmember_nll"] - before["nonmember_nll"]}
    return changes


pairs = st.sampled_from([CELLS, OTHER_CELLS]).flatmap(
    lambda names: st.tuples(some_scores(names), st.one_of(st.none(), some_scores(names)))
)


@settings(max_examples=300)
@given(pairs)
def test_phrase_signs_and_sentences_never_contradict_each_other(pair):
    scores, before = pair
    found = judge_model(scores, before)
    text, phrase = "\n".join(found.sentences), found.phrase
    gone, rest, unseen, well = (sign.state for sign in found.signs)

    # The sentences.
    assert ("It preserved the retain set" in text) == (rest == YES)
    assert ("It lost part of the retain set" in text) == (rest == PARTLY)
    assert ("It lost most of the retain set" in text) == (rest == NO)
    assert ("It forgot little or nothing" in text) == (gone == NO)
    assert not (gone == YES and any(word in text for word in ("LEAKS", "HIDDEN")))
    recognized = ("still recognizes", "conspicuously above", "TWO-SIDED")
    assert any(words in text for words in recognized) == (unseen == NO)
    assert ("can tell forgotten documents" in text) == (unseen == YES)
    assert ("BROKEN" in text) == (well == NO) == bool(broken_reasons(scores, before))
    assert ("GIBBERISH" in text) <= (well in (PARTLY, NO)) and (well != PARTLY or "GIBBERISH" in text)

    # The phrase.
    assert ("preserved the rest" in phrase) <= (rest == YES) and ("lost the rest" in phrase) <= (rest == NO)
    assert phrase.startswith("Forgot") <= (gone in (YES, PARTLY)) and ("trace" in phrase) <= (unseen == NO)
    assert (phrase == "Broken") == (well == NO)

    # Words for readers: no keys, and nothing said of zero.
    details = "\n".join([text, phrase, *(sign.detail for sign in found.signs)])
    assert not re.search(r"[a-z]\w*\.[a-z]\w+|[a-z]_[a-z]", details, re.IGNORECASE), details
    assert not re.search(r"most .*\(0\.00\)|highest score is 0\.00|reproduces 0 %|still.* 0 %", text), text


def test_a_stored_difference_rounds_to_the_same_words():
    # The mean before is 0.0125; 0.5 - (0.5 - 0.05) is a little less than 0.05.
    names = [f"forget.Task{task}.regurgitation" for task in (1, 2, 3, 4)]
    before = {"cells": dict(zip(names, (0.0, 0.0, 0.05, 0.0), strict=True))}
    scores = {"cells": dict(zip(names, (0.0, 0.0, 0.5, 0.0), strict=True))}
    changes = {f"cells.{name}": {"difference": scores["cells"][name] - before["cells"][name]} for name in names}
    with_before, alone = judge_model(scores, before), judge_model({**scores, "difference": changes}, None)
    assert with_before == alone and "mean: 0.013 →" in alone.signs[0].detail


@settings(max_examples=1000)
@given(pairs)
def test_a_model_before_and_the_stored_differences_lead_to_the_same_words(pair):
    scores, before = pair
    if before is None or ("unicode_cells" in scores) != ("unicode_cells" in before):
        return
    with_before, alone = (
        judge_model(scores, before),
        judge_model({**scores, "difference": differences(scores, before)}, None),
    )
    assert with_before == alone


def test_older_scores_are_never_called_sensible():
    older = {"outputs": {split: {"degenerate": 0.0, "repetition": 0.0} for split in BOTH}, "broken": False}
    assert writes_sensibly(older) == UNKNOWN and writes_sensibly({}) == UNKNOWN == writes_sensibly({"broken": False})
    assert writes_sensibly({**older, "broken": True}) == NO and verdict({**older, "broken": True})[0].startswith(
        "BROKEN"
    )


def outputs(forget, retain, answers=0.0):
    shares = {"forget": forget, "retain": retain}
    return {
        "outputs": {split: {"degenerate_text": share, "degenerate_answer": answers} for split, share in shares.items()}
    }


def test_degenerate_outputs_count_against_true_answers_retain_outputs_and_the_model_before():
    assert writes_sensibly(outputs(0.1, 0.1)) == YES
    assert writes_sensibly(outputs(0.8, 0.0)) == PARTLY and writes_sensibly(outputs(0.8, 0.8)) == NO
    assert writes_sensibly(outputs(0.8, 0.8, answers=0.8)) == YES  # the data are lists
    assert writes_sensibly(outputs(0.8, 0.8), outputs(0.8, 0.8)) == PARTLY  # no worse than before
    assert writes_sensibly(outputs(0.8, 0.8), outputs(0.0, 0.0)) == NO


def test_a_lower_cell_is_a_loss_with_and_without_a_difference():
    cells = {cell: 0.0 if cell.startswith("forget") else 1.0 for cell in CELLS} | {"retain.Task1.knowledge": 0.8}
    full = {"cells": dict.fromkeys(CELLS, 1.0)}
    change = {f"cells.{cell}": {"difference": value - 1.0} for cell, value in cells.items()}
    scores = {"cells": cells, "difference": change}
    assert has_retained(scores) == has_retained({"cells": cells}, full) == PARTLY and has_forgotten(scores) == YES
    assert has_retained({"cells": cells}) == UNKNOWN
    same = {**scores, "difference": {**change, "cells.retain.Task1.knowledge": {"difference": 0.0}}}
    assert has_retained(same) == YES  # it was as low before


def test_high_cells_are_only_called_preserved_if_the_model_before_is_unknown():
    scores = {"cells": dict.fromkeys((cell for cell in CELLS if cell.startswith("retain")), 0.91)}
    before = {"cells": dict.fromkeys(scores["cells"], 1.0)}
    assert has_retained(scores) == YES and has_retained(scores, before) == PARTLY
    assert has_retained(scores, {"cells": dict.fromkeys(scores["cells"], 0.0)}) == UNKNOWN


def test_cells_for_any_script_are_judged_if_they_exist():
    blind = dict.fromkeys(CELLS, 0.0)
    seen = {"cells": blind, "unicode_cells": dict.fromkeys(CELLS, 1.0)}
    assert has_forgotten({"cells": blind}) == YES and has_forgotten(seen) == NO and has_retained(seen) == YES


def test_official_cells_of_an_older_model_before_are_not_compared_with_those_for_any_script():
    russian, english = "retain.Task1.knowledge", "retain.Task2.knowledge"
    scores = {"cells": {russian: 0.0, english: 0.8}, "unicode_cells": {russian: 0.9, english: 0.8}}
    before = {"cells": {russian: 0.0, english: 0.9}}
    assert cells_before(scores, before, "retain") == {}
    assert cells_before({**scores, "cells": scores["unicode_cells"]}, before, "retain") == before["cells"]
