import json

import pytest
import torch

from neko_lean.data import Example, find_format
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.scoring.benchmarks import (
    MuseRows,
    TofuRow,
    TofuRows,
    forget_truth_ratios,
    muse,
    muse_scores,
    tofu,
    tofu_scores,
)
from neko_lean.scoring.benchmarks.muse import question_with_examples
from neko_lean.scoring.generation import GenerationLimits
from neko_lean.scoring.limits import TruncationCounts
from neko_lean.scoring.measure import ScoringContext


@pytest.fixture
def context(model, tmp_path):
    lm = load_model(model, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(model)
    limits, prompts = GenerationLimits(4, 8), find_format("plain", tokenizer)
    return ScoringContext(lm, tokenizer, prompts, tmp_path, limits, TruncationCounts(), True)


def tofu_set(name):
    """Three questions with one, two and three wrong answers; the first answer is short."""
    answers = ["wood", "the land of Foo1", "a river"]
    return [
        TofuRow(
            Example(f"{name} {n}", f"Where is Foo{n}?", answer, "TOFU", kind="qa"),
            f"in {answer}",
            ("Rix", "sang", "born")[: n + 1],
        )
        for n, answer in enumerate(answers)
    ]


def test_tofu_scores(context, monkeypatch):
    monkeypatch.setattr(tofu, "MAX_NEW_TOKENS", 16)  # a random model seldom ends an answer
    holdout = [row.example for row in tofu_set("holdout")]
    rows = TofuRows("forget01", *(tofu_set(name) for name in ("forget", "retain", "authors", "facts")), holdout)
    ratios = forget_truth_ratios(context, rows)
    scores = tofu_scores(context, rows, ratios)

    assert scores["truth_ratios"] == pytest.approx(ratios)
    assert scores["forget_quality"] == 1.0  # the model is its own reference
    assert scores["min_k_auc"] == 0.5 and scores["privleak"] == pytest.approx(0)  # holdout texts are the forget texts
    assert scores["utility"]["real_authors"]["probability"] > scores["utility"]["retain"]["probability"]
    assert tofu_scores(context, rows)["forget_quality"] is None
    json.dumps(scores, allow_nan=False)


def test_muse_scores(context):
    questions = [question_with_examples("q1", [("Where?", "Here.")], "Who sang?", "Foo1 sang.")]
    verbatim = [Example("v1", "Once Foo1 walked", "into the wood of Foo1.", "MUSE", kind="completion")]
    texts = ["Foo1 walked into the wood.", "Foo2 sang."]
    scores = muse_scores(context, MuseRows(verbatim, questions, questions, texts, texts))

    assert scores["knowledge_memorisation"] == scores["utility"]
    assert scores["privleak"] == pytest.approx(0)
    assert 0 <= scores["extraction_strength"] <= scores["exact_memorisation"] <= 1


def test_generations_end_after_the_published_numbers_of_tokens():
    assert tofu.generation_limits(32) == GenerationLimits(32, 200, stop_early=False)
    assert muse.generation_limits(32).max_new_tokens == 128 and muse.KNOWLEDGE_TOKENS == 32
