"""A model with NaN or infinite outputs raises an error; it gives no score, no cache and no invalid JSON."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import neko_lean
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import nan_to_null, strict_json
from neko_lean.models.finite import greedy_tokens
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.options import RunOptions
from neko_lean.scoring.generation import generate
from neko_lean.scoring.memorisation import LARGEST_RATIO, truth_ratio
from neko_lean.scoring.mmlu import mmlu
from neko_lean.scoring.views import View, view_documents
from neko_lean.training import evaluation
from tests.helpers import SMALL, make_cache, make_rows, random_model
from tests.scoring.calls import score_with
from tests.scoring.subjects import make_subject

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def overflowing(world, tmp_path_factory):
    """A model with finite weights and infinite logits."""
    folder = random_model(world, tmp_path_factory.mktemp("overflowing"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].sign() * 3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_it_is_not_scored(overflowing, world, tmp_path):
    with pytest.raises(NekoLeanError, match="NaN or infinite"):
        score_with(overflowing, world, tmp_path / "scores", max_new_tokens=4, quiet=True)
    assert not (tmp_path / "scores").exists()
    lm, tokenizer = load_model(overflowing, torch.float32, CPU), load_tokenizer(overflowing)
    ids = [tokenizer(text)["input_ids"] for text in ("Foo1 is a river.", "Rix2 walked into the wood")]
    with pytest.raises(NekoLeanError, match=r"document 1 of 2 is NaN or infinite"):
        view_documents(lm, tokenizer, ids)
    with pytest.raises(NekoLeanError, match="generated token"):
        list(generate(lm, tokenizer, make_rows("Foo", 1), batch_size=4, max_new_tokens=2))
    with pytest.raises(NekoLeanError, match="MMLU subject"):
        mmlu(lm, tokenizer, {"x": make_subject("x")}, shots=1, batch_tokens=4096)


@pytest.mark.parametrize("mass", [0.9, 1.0])
def test_it_is_not_cached(overflowing, world, tmp_path, mass):
    for options in ({}, {"forget": world}):
        with pytest.raises(NekoLeanError, match=r"row .* is NaN or infinite"):
            make_cache(overflowing, world, tmp_path / "cache", mass=mass, dtype="float32", **options)
        assert not list(tmp_path.iterdir())


def test_it_is_not_trained(overflowing, world, tmp_path):
    with pytest.raises(NekoLeanError):
        neko_lean.memorize(
            overflowing,
            tmp_path / "out",
            data=world,
            overrides={**SMALL, "dtype": "float32"},
            run=RunOptions(quiet=True),
        )
    assert not (tmp_path / "out").exists()


def test_non_finite_numbers_are_not_written_as_json():
    finite = {"a": [1.0, {"b": None, "c": True}], "d": "NaN"}
    assert json.loads(strict_json(finite, "scores.json")) == finite == nan_to_null(finite)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(NekoLeanError, match=r"a\[1\].b in scores.json would be"):
            strict_json({"a": [1.0, {"b": value}]}, "scores.json")
        assert nan_to_null({"a": (1, {"b": value}), "c": 2.5}) == {"a": [1, {"b": None}], "c": 2.5}


def test_greedy_tokens_are_the_argmax_or_an_error():
    logits = torch.randn(5, 7)
    logits[0, 3] = -torch.inf  # a token of probability 0
    assert torch.equal(greedy_tokens(logits, "x"), logits.argmax(1))
    for value in (torch.nan, torch.inf):
        logits[2, 4] = value
        with pytest.raises(NekoLeanError):
            greedy_tokens(logits, "x")


def test_a_ratio_of_underflowing_probabilities_is_finite():
    def view(*logp):
        return View(*(torch.tensor(logp, dtype=torch.float64).numpy() for _ in range(4)))

    assert truth_ratio(view(-1.0, -3.0), [view(-3.0), view(-3.0)]) == pytest.approx(math.exp(-1))
    assert truth_ratio(view(-800.0), [view(-1.0)]) == truth_ratio(view(-800.0), [view(-900.0)]) == LARGEST_RATIO


def test_a_nan_metric_makes_no_checkpoint_the_best():
    assert math.isnan(evaluation.quality({"eval_forget_exact": 1.0, "eval_retain_kl": math.nan}))
