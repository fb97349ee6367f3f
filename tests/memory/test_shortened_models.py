"""Models with fewer layers, whose predictions must be those of the whole model."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.memory import repeated_layers, shortened_models
from neko_lean.memory.fake_models import FakeModels
from neko_lean.memory.prediction import step_memory
from neko_lean.memory.shortened_models import END, all_layers, kept_layers
from neko_lean.memory.two_models import TWO_MODEL_BASELINES, predict_two_models
from neko_lean.recipe import load_recipe
from tests.memory.configs import LLAMA, TWO_KINDS, with_layers

LONG_LLAMA, LONG_GEMMA2 = with_layers(LLAMA, 9), with_layers(TWO_KINDS, 17)


def whole_models(monkeypatch):
    """Predict from whole models from now on."""
    monkeypatch.setattr(shortened_models, "shortened", all_layers)


def layers_that_run(monkeypatch):
    """Numbers of all layers that will have run."""
    numbers = set()
    call = repeated_layers._RepeatedLayer.__call__

    def noted(self, *args, **kwargs):
        numbers.add(self.number)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(repeated_layers._RepeatedLayer, "__call__", noted)
    return numbers


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": "float32", "train_last": 1},
        {"lora_rank": 4, "quantize_base": "nf4"},
        {"backward": "checkpointed", "lora_rank": 4},
        {"backward": "checkpointed", "train_only": "mlp"},
        {"backward": "plain"},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [LONG_LLAMA, LONG_GEMMA2], ids=["llama", "gemma2"])
def test_a_step_is_the_same_to_the_byte(config, change, monkeypatch):
    recipe = load_recipe("neko", change)
    micro = [(8, 64), (8, 64), (3, 64)] if recipe.backward == "layerwise" else [(9, 64)]
    with monkeypatch.context() as watched:
        numbers = layers_that_run(watched)
        memory = step_memory(config, recipe, micro)
    assert len(numbers) < config.num_hidden_layers
    whole_models(monkeypatch)
    assert memory == step_memory(config, recipe, micro)


@pytest.mark.parametrize("change", [{}, {"lora_rank": 4, "quantize_base": "nf4"}], ids=str)
def test_a_rank_is_the_same_to_the_byte(change, monkeypatch):
    recipe = load_recipe("neko", change)
    memory = step_memory(LONG_LLAMA, recipe, [(8, 64)], ranks=2)
    whole_models(monkeypatch)
    assert memory == step_memory(LONG_LLAMA, recipe, [(8, 64)], ranks=2)


def test_frozen_and_trained_layers_are_shortened_apart(monkeypatch):
    recipe, config = load_recipe("neko", {"train_last": 8}), with_layers(LLAMA, 17)
    with monkeypatch.context() as watched:
        numbers = layers_that_run(watched)
        memory = step_memory(config, recipe, [(8, 64)])
    assert numbers == set(range(14))
    whole_models(monkeypatch)
    assert memory == step_memory(config, recipe, [(8, 64)])


@pytest.mark.parametrize("baseline", TWO_MODEL_BASELINES, ids=lambda baseline: baseline.name)
@pytest.mark.parametrize("config", [LONG_LLAMA, LONG_GEMMA2], ids=["llama", "gemma2"])
def test_two_models_are_the_same_to_the_byte(config, baseline, monkeypatch):
    estimate = predict_two_models(config, baseline, 8, 64)
    whole_models(monkeypatch)
    assert estimate == predict_two_models(config, baseline, 8, 64)


@pytest.mark.parametrize(
    "change",
    [{"lora_rank": 4, "train_last": 3}, {"lora_rank": 4, "lora_targets": "layers.5.self_attn.q_proj"}],
    ids=str,
)
def test_a_recipe_that_names_layers_of_a_model_with_adapters_gets_all_of_them(change, monkeypatch):
    numbers = layers_that_run(monkeypatch)
    step_memory(LONG_LLAMA, load_recipe("neko", change), [(8, 64)])
    assert numbers == set(range(9))


def test_a_layer_that_cannot_be_repeated_is_run_in_the_whole_model(monkeypatch):
    monkeypatch.setattr(repeated_layers, "_record", lambda _: None)
    recipe = load_recipe("neko")
    memory = step_memory(LONG_LLAMA, recipe, [(8, 64)])
    estimates = [predict_two_models(LONG_LLAMA, baseline, 8, 64) for baseline in TWO_MODEL_BASELINES]
    whole_models(monkeypatch)
    assert memory == step_memory(LONG_LLAMA, recipe, [(8, 64)])
    assert estimates == [predict_two_models(LONG_LLAMA, baseline, 8, 64) for baseline in TWO_MODEL_BASELINES]


def test_the_model_has_all_its_layers_afterwards():
    models, recipe = FakeModels.of(LONG_GEMMA2), load_recipe("neko")
    kinds = list(models.config.layer_types)
    for lora_rank in (0, 4):
        step_memory(models, replace(recipe, lora_rank=lora_rank), [(8, 64)])
        predict_two_models(models, TWO_MODEL_BASELINES[0], 8, 64)
        with models.use(torch.bfloat16) as (lm, _):
            assert len(lm.backbone.layers) == 17
            assert lm.backbone.config.layer_types == kinds


def test_kept_layers():
    kept = kept_layers("a" * 20)
    assert [layer.number for layer in kept] == [0, 1, 2, 3, 17, 18, 19]
    assert [layer.copies for layer in kept] == [1, 1, 1, 14, 1, 1, 1]
    assert [layer.counted for layer in kept] == [True, True, False, False, False, True, True]
    assert [layer.number for layer in kept_layers("ab" * 9 + "a")] == [*range(8), *range(12, 19)]
    assert len(kept_layers("a" * 7)) == 7 and all(layer.counted for layer in kept_layers("a" * 7))


@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=4), st.integers(1, 30)), max_size=4))
def test_the_kept_layers_stand_for_all(runs):
    kinds = "".join(pattern * repeats for pattern, repeats in runs)
    kept = kept_layers(kinds)
    numbers = [layer.number for layer in kept]
    assert numbers == sorted(set(numbers))
    assert sorted(kinds) == sorted("".join(kinds[layer.number] * layer.copies for layer in kept))
    for layer, following in itertools.pairwise(kept):  # the same kinds follow each other as in the whole model
        assert kinds[layer.number : layer.number + 2] == kinds[layer.number] + kinds[following.number]
    assert all(layer.copies == 1 or not layer.counted for layer in kept)
    if kinds:
        assert numbers[0] == 0 and numbers[-1] == len(kinds) - 1
        assert all(layer.counted for layer in (kept[0], kept[-1])) and END > 1
