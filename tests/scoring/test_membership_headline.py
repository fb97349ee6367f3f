"""The strongest attack, its interval, and how often a model that never saw the documents is accused."""

import numpy as np
import pytest

from neko_lean.scoring.judge import NO, UNKNOWN, YES, looks_unseen
from neko_lean.scoring.membership import summary
from neko_lean.scoring.membership_headline import membership_tests, num_attacks, strongest_attack

NAMES = ("loss", "zlib", "min_k", "min_k_plus_plus")


def scores_of(members, nonmembers):
    """Scores with an attack for each column: [documents, attacks]."""
    lines = [
        {"side": side, "task": "anchor", **dict(zip(NAMES, map(float, row), strict=True))}
        for side, rows in (("member", members), ("nonmember", nonmembers))
        for row in rows
    ]
    return {"membership": summary(lines)}


def attack(auc, width=0.1, two_sided=0.5):
    ends = {
        "auc_interval": [auc - width, auc + width],
        "two_sided_auc_interval": [two_sided - width, two_sided + width],
    }
    return {"auc": auc, "two_sided_auc": two_sided, **ends}


def with_attacks(**attacks):
    return {"membership": {"auc": 0.5, "attacks": {"all": attacks}}}


def test_the_strongest_attack_is_farthest_from_chance():
    scores = with_attacks(loss=attack(0.67), zlib=attack(0.95), min_k=attack(0.3))
    strongest = strongest_attack(scores)
    assert (strongest.attack, strongest.value, strongest.label) == ("zlib", 0.95, "zlib")
    assert strongest.key == "membership.attacks.all.zlib.auc" and num_attacks(scores) == 3
    assert strongest.interval[0] < 0.85 and strongest.interval[1] == 1.0  # wider than for a single test
    assert looks_unseen(scores) == NO


def test_one_attack_is_enough_to_be_recognized():
    assert looks_unseen(with_attacks(loss=attack(0.5), zlib=attack(0.52))) == YES
    assert looks_unseen(with_attacks(loss=attack(0.5), min_k=attack(0.2))) == NO
    assert looks_unseen(with_attacks(loss=attack(0.5), zlib=attack(0.5, two_sided=0.9))) == NO
    alike = with_attacks(loss=attack(0.5), zlib=attack(0.5, two_sided=0.1))
    assert looks_unseen(alike) == YES and strongest_attack(alike).value == 0.5
    assert strongest_attack(with_attacks(min_k_plus_plus=attack(0.5, two_sided=0.9))).label == "min-k++, two-sided"


def test_a_conspicuous_attack_comes_before_a_stronger_uncertain_one():
    assert strongest_attack(with_attacks(loss=attack(0.8, 0.4), zlib=attack(0.7, 0.05))).attack == "zlib"
    both = strongest_attack(with_attacks(loss=attack(0.9, two_sided=0.95)))
    assert both.value == 0.9  # the members are on one side


def test_older_scores_never_look_unseen_without_all_attacks():
    loss = {"auc": 0.5, "auc_interval": [0.4, 0.6]}
    assert looks_unseen({"membership": loss}) == UNKNOWN and looks_unseen({}) == UNKNOWN
    assert looks_unseen({"membership": {"auc": 0.2, "auc_interval": [0.1, 0.3]}}) == NO
    assert looks_unseen({"membership": {"auc": 0.9, "score": 0.2, "perfect_score_5th_percentile": 0.7}}) == NO
    assert looks_unseen({"membership": {"auc": 0.5, "score": 1.0, "perfect_score_5th_percentile": 0.7}}) == UNKNOWN
    partial = with_attacks(loss=attack(0.5), zlib={"auc": 0.5})
    assert looks_unseen(partial) == UNKNOWN and strongest_attack({}) is None and membership_tests({}) == []


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_models_that_never_saw_the_documents_are_rarely_accused(correlation, monkeypatch):
    monkeypatch.setattr("neko_lean.scoring.membership.NUM_RESAMPLES", 200)
    monkeypatch.setattr("neko_lean.scoring.membership.perfect_range", lambda *counts: (0.9, 0.7))
    rng = np.random.default_rng(0)

    def documents():
        shared, own = rng.normal(size=(24, 1)), rng.normal(size=(24, 4))
        return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own

    accused = sum(looks_unseen(scores_of(documents(), documents())) == NO for _ in range(40))
    assert accused <= 5  # 2 are expected of 40
    assert looks_unseen(scores_of(documents() - 3, documents())) == NO
