"""Repeating what identical layers allocate, compared with running every layer."""

import dataclasses

import pytest
import torch

from neko_lean.memory import fake_step
from neko_lean.memory.fake_models import FakeModels
from neko_lean.memory.fake_tensors import MetaKernels
from neko_lean.memory.prediction import step_memory
from neko_lean.memory.two_models import TWO_MODEL_BASELINES, predict_two_models
from neko_lean.recipe import load_recipe
from tests.memory.configs import LLAMA, TWO_KINDS, with_layers


def every_layer(monkeypatch):
    """Run every layer."""
    monkeypatch.setattr(fake_step, "repeat_layers", lambda *_, **__: None)


@pytest.mark.parametrize("backward", ["layerwise", "checkpointed", "plain"])
@pytest.mark.parametrize("change", [{}, {"train_last": 2, "dtype": "float32"}], ids=str)
@pytest.mark.parametrize("config", [LLAMA, TWO_KINDS], ids=["llama", "gemma2"])
def test_a_step_is_the_same_to_the_byte(config, change, backward, monkeypatch):
    recipe = load_recipe("neko", {"backward": backward, **change})
    micro = [(8, 128), (8, 128), (3, 128)] if backward == "layerwise" else [(19, 128)]
    repeated = step_memory(config, recipe, micro)
    every_layer(monkeypatch)
    assert repeated == step_memory(config, recipe, micro)


@pytest.mark.parametrize("baseline", TWO_MODEL_BASELINES, ids=lambda baseline: baseline.name)
def test_two_models_are_the_same_to_the_byte(baseline, monkeypatch, tmp_path):
    LLAMA.save_pretrained(tmp_path)
    repeated = predict_two_models(tmp_path, baseline, 8, 128)
    every_layer(monkeypatch)
    assert repeated == predict_two_models(tmp_path, baseline, 8, 128)


def operators_of_a_step(layers, monkeypatch):
    """How many operators a step of a model with so many layers runs, without building the model."""
    count = 0
    dispatch = MetaKernels.__torch_dispatch__

    def counted(self, *args):
        nonlocal count
        count += 1
        return dispatch(self, *args)

    models = FakeModels.of(with_layers(LLAMA, layers))
    with models.use(torch.bfloat16):
        pass
    with monkeypatch.context() as patched:
        patched.setattr(MetaKernels, "__torch_dispatch__", counted)
        step_memory(models, load_recipe("neko"), [(8, 128)])
    with models.use(torch.bfloat16) as (_, recordings):
        return count, len(recordings.calls)


def test_another_layer_costs_a_step_next_to_nothing(monkeypatch):
    few, recordings = operators_of_a_step(4, monkeypatch)
    many, still = operators_of_a_step(32, monkeypatch)
    assert recordings == still == 2  # without gradient, and with
    assert few > 400
    assert (many - few) / 28 < 20  # running a layer forward and backward takes ten times as many


@pytest.mark.parametrize("config", [LLAMA, TWO_KINDS], ids=["llama", "gemma2"])
def test_steps_that_share_a_model_are_those_of_new_models(config):
    models, recipe = FakeModels.of(config), load_recipe("neko")
    for changes in ({}, {"train_last": 2}, {"backward": "checkpointed"}, {"backward": "plain"}, {}):
        changed = dataclasses.replace(recipe, **changes)
        assert step_memory(models, changed, [(8, 128)]) == step_memory(config, changed, [(8, 128)]), changes
    for baseline in TWO_MODEL_BASELINES:
        assert predict_two_models(models, baseline, 8, 128) == predict_two_models(config, baseline, 8, 128)


def test_options_that_change_only_sums_run_nothing(monkeypatch):
    models, recipe = FakeModels.of(LLAMA), load_recipe("neko")
    memory = step_memory(models, recipe, [(8, 128)])
    monkeypatch.setattr(FakeModels, "use", None)
    offloaded = dataclasses.replace(recipe, offload_state=True, offload_activations=True)
    assert step_memory(models, offloaded, [(8, 128)]) is memory
