"""Statistics of membership inference: AUCs against counting pairs, intervals, and the summary."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.scoring import membership
from neko_lean.scoring.membership import (
    auc,
    auc_interval,
    document_losses,
    membership_score,
    perfect_range,
    roc,
    summary,
    tpr,
    two_sided_auc,
)

losses = st.lists(st.integers(0, 6), min_size=1, max_size=30)


@given(losses, losses)
def test_auc_counts_pairs_with_ties_half(members, nonmembers):
    pairs = [1.0 if m < n else 0.5 if m == n else 0.0 for m in members for n in nonmembers]
    assert auc(members, nonmembers) == pytest.approx(np.mean(pairs), abs=1e-12)


@given(losses, losses)
def test_area_under_the_roc_curve_is_the_auc(members, nonmembers):
    curve = roc(members, nonmembers)
    assert (curve["fpr"][0], curve["tpr"][0], curve["fpr"][-1], curve["tpr"][-1]) == (0, 0, 1, 1)
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(auc(members, nonmembers), abs=1e-12)


def test_membership_score():
    assert membership_score(0.5) == 1.0 and membership_score(1.0) == membership_score(0.0) == 0.0
    assert auc([1, 2], [3, 4]) == 1.0  # members with the lower loss stand out


def test_two_sided_auc_detects_members_on_both_sides():
    other = np.linspace(4, 6, 50)
    members = np.concatenate([np.linspace(0, 1, 25), np.linspace(9, 10, 25)])
    assert auc(members, other) == 0.5 and two_sided_auc(members, other) == 1.0
    assert two_sided_auc(other, other) == pytest.approx(0.5, abs=0.03)
    assert two_sided_auc(np.full(9, 5.0), other) == 0.0
    assert tpr(members, other, low=True) == tpr(members, other, low=False) == 0.5


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12))
def test_each_nonmember_is_compared_with_the_others(values):
    others = [np.median(np.delete(values, place)) for place in range(len(values))]
    assert membership._medians_of_others(np.array(values, float)).tolist() == others


def test_two_sided_auc_of_unseen_members_is_one_half_on_average():
    rng = np.random.default_rng(0)
    areas = [two_sided_auc(rng.normal(size=24), rng.normal(size=24)) for _ in range(400)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.015)


def test_tpr_at_one_percent():
    other = np.arange(200.0)  # at most two false positives
    assert tpr([0.5, 1.5, 2.5, 300], other, low=True) == 0.5
    assert tpr([0.5, 1.5, 198.5, 300], other, low=False) == 0.5
    assert tpr([-1.0, 0.0, 0.5], np.arange(50.0), low=True) == pytest.approx(1 / 3)  # no false positive among 50


def test_auc_interval_coverage():
    """Of 200 samples of 30 + 30 losses with a true AUC of 0.76, about 95 % of the intervals contain it."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = auc_interval(rng.normal(0, 1, 30), rng.normal(1, 1, 30))
        assert 0 <= low <= high <= 1
        covered += low <= 0.7602 <= high
    assert 0.88 <= covered / 200 <= 1
    assert auc_interval([1.0, 1.0], [2.0, 3.0]) == [1.0, 1.0]


def test_perfect_model_scores_below_one_with_few_documents():
    assert perfect_range(150, 150) == pytest.approx((0.946, 0.87), abs=0.01)
    assert perfect_range(34, 34) == pytest.approx((0.887, 0.725), abs=0.015)


DOCUMENTS = ["Foo1 is a river.", "Rix2\n\nRix2 is a river and then some more words in the land of Rix2.", "Foo a"]


def test_losses_equal_those_of_transformers(world, model):
    lm, tokenizer = load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model)
    got = document_losses(lm, tokenizer, DOCUMENTS, batch_tokens=64)
    for text, loss in zip(DOCUMENTS, got, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert loss == pytest.approx(lm.model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)


def test_summary_of_tasks_that_have_members_and_nonmembers():
    def lines(side, task, values):
        return [{"side": side, "task": task, "loss": v, "zlib": -v, "min_k": v, "min_k_plus_plus": v} for v in values]

    documents = lines("member", "Task1", [1.0, 2.0]) + lines("member", "Task2", [9.0, 8.0])
    documents += lines("nonmember", "Task1", [3.0, 4.0]) + lines("nonmember", "anchor", [5.0, 6.0])
    found = summary(documents)
    assert list(found["attacks"]) == ["all", "Task1"]
    assert found["attacks"]["Task1"]["loss"]["auc"] == 1 and found["attacks"]["Task1"]["zlib"]["auc"] == 0
    assert found["auc"] == 0.5 and found["score"] == 1 and found["two_sided_auc"] == 1
    assert "reference" not in found["attacks"]["all"] and found["members"] == found["nonmembers"] == 4
