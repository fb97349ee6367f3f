"""Repeating what identical layers allocate, compared with running every layer."""

import pytest
from transformers import Gemma2Config, LlamaConfig

from neko_lean.memory import fake_step
from neko_lean.memory.prediction import step_memory
from neko_lean.memory.two_models import TWO_MODEL_BASELINES, predict_two_models
from neko_lean.recipe import load_recipe

LLAMA = LlamaConfig(
    vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip
TWO_KINDS = Gemma2Config(
    vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, sliding_window=64, architectures=["Gemma2ForCausalLM"],
)  # fmt: skip


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
