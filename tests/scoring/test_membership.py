"""The loss attack: losses against transformers' own, the area by counting pairs."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.documents import read_documents
from neko_lean.errors import NekoLeanError
from neko_lean.modeling import load_model, load_tokenizer
from neko_lean.scoring.membership import (
    auc,
    auc_interval,
    document_losses,
    membership_score,
    perfect_range,
    two_sided_auc,
)

losses = st.lists(st.integers(0, 6), min_size=1, max_size=30)


@given(losses, losses)
def test_auc_counts_pairs_with_ties_half(members, nonmembers):
    pairs = [1.0 if m < n else 0.5 if m == n else 0.0 for m in members for n in nonmembers]
    assert auc(members, nonmembers) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_score():
    assert membership_score(0.5) == 1.0 and membership_score(1.0) == membership_score(0.0) == 0.0
    assert auc([1, 2], [3, 4]) == 1.0  # members with the lower loss stand out


def test_half_remembered_and_half_blown_up_is_caught():
    other = np.linspace(4, 6, 50)
    members = np.concatenate([np.linspace(0, 1, 25), np.linspace(9, 10, 25)])
    assert auc(members, other) == 0.5 and two_sided_auc(members, other) == 1.0
    assert two_sided_auc(other, other) == 0.5 and two_sided_auc(np.full(9, 5.0), other) == 0.0


def test_the_interval_covers_what_it_should():
    """Of 200 draws of 30 + 30 losses whose true AUC is 0.76, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = auc_interval(rng.normal(0, 1, 30), rng.normal(1, 1, 30), draws=300)
        assert 0 <= low <= high <= 1
        held += low <= 0.7602 <= high
    assert 0.88 <= held / 200 <= 1
    assert auc_interval([1.0, 1.0], [2.0, 3.0]) == (1.0, 1.0)


def test_a_perfect_model_is_not_perfect_with_few_documents():
    # DESIGN's own numbers: 150 + 150 documents average 0.946 (5th percentile 0.87), 34 + 34 0.887 (0.725).
    assert perfect_range(150, 150) == pytest.approx((0.946, 0.87), abs=0.01)
    assert perfect_range(34, 34) == pytest.approx((0.887, 0.725), abs=0.015)


def test_losses_are_transformers_own(world, model):
    lm = load_model(model, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(model)
    documents = ["Foo1 is a river.", "Rix2\n\nRix2 is a river and then some more words in the land of Rix2.", "Foo a"]
    got = document_losses(lm, tokenizer, documents, batch_tokens=64)
    for text, loss in zip(documents, got, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert loss == pytest.approx(lm.model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
    with pytest.raises(NekoLeanError, match="two tokens"):
        document_losses(lm, tokenizer, ["F"], batch_tokens=64)


@pytest.mark.parametrize(
    ("text", "words"), [("", "no documents"), (json.dumps({"text": "x"}), "row 1, column document"), ("{", "line 1")]
)
def test_bad_documents_are_named(tmp_path, text, words):
    (tmp_path / "member.jsonl").write_text(text)
    with pytest.raises(NekoLeanError, match=words):
        read_documents(tmp_path / "member.jsonl", "a hint")
    with pytest.raises(NekoLeanError, match="does not exist"):
        read_documents(tmp_path / "other.jsonl", "a hint")
