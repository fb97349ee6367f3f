"""Rows with a shared prefix equal single rows, for every kind of attention."""

import random

import pytest
import torch
from transformers import (
    BlenderbotSmallConfig,
    BloomConfig,
    GPT2Config,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    Olmo3Config,
    OlmoConfig,
    OPTConfig,
)
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.scoring import shared_prefix
from neko_lean.scoring.shared_prefix import common_prefix, last_hidden, shares_prefixes

SIZE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3}
ATTENTION = {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
GROUPED = {**ATTENTION, "num_key_value_heads": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
FAMILIES = {
    "olmo": OlmoConfig(**SIZE, **ATTENTION),
    "olmo, grouped queries": OlmoConfig(**SIZE, **GROUPED),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "opt": OPTConfig(**SIZE, num_attention_heads=4, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32),
    "bloom": BloomConfig(vocab_size=50, hidden_size=32, n_layer=3, n_head=4),
    "mistral, sliding": MistralConfig(**SIZE, **GROUPED, sliding_window=5),
    "olmo 3, some sliding": Olmo3Config(**SIZE, **GROUPED, **SLIDING),
    # These keep more than keys and values, or raise, so their rows run as a whole.
    "mamba": MambaConfig(**SIZE, state_size=4, expand=2),
    "lfm2": Lfm2Config(**SIZE, **GROUPED, layer_types=["conv", "full_attention", "conv"]),
    "blenderbot": BlenderbotSmallConfig(
        vocab_size=50, d_model=32, decoder_layers=3, encoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64
    ),
}


def lively(config):
    """A random model whose last hidden state depends on every token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    return as_causal_lm(model)


def alone(lm, row):
    """Logits [V] after one row, from transformers' forward."""
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]


def rows(shared, own, seed=0):
    rng = random.Random(seed)
    prefix = [rng.randrange(50) for _ in range(shared)]
    return [prefix + [rng.randrange(50) for _ in range(length)] for length in own]


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_equal_single_rows(family):
    # In float64: in float32, rounding alone moves Mamba's logits by more than the tolerance. They are always float32.
    lm = as_causal_lm(lively(FAMILIES[family]).model.double())
    some = rows(12, (9, 1, 3, 14, 2, 2, 7, 1))
    wanted = torch.stack([alone(lm, row) for row in some])
    assert (wanted.std(0) > 0.05).any()
    for batch_tokens in (40, 1000):
        got = last_hidden(lm, some, 0, batch_tokens=batch_tokens) @ lm.head.T
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4, check_dtype=False)


def test_families_that_share_prefixes():
    shared = {family: shares_prefixes(lively(config), 0) for family, config in FAMILIES.items()}
    assert {family for family, does in shared.items() if not does} == {"mamba", "lfm2", "blenderbot"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwritten_prefix_is_detected(monkeypatch, dtype):
    lm = lively(FAMILIES["gpt2"])
    lm = as_causal_lm(lm.model.to(dtype))
    monkeypatch.setattr(shared_prefix._PrefixCache, "update", Cache.update)
    assert not shares_prefixes(lm, 0)


def test_shared_prefix_runs_once():
    lm = lively(FAMILIES["olmo"])
    some, seen = rows(20, (3, 3, 3, 3, 3)), []
    assert shares_prefixes(lm, 0)  # so that the probe's forward passes are not counted
    lm.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    last_hidden(lm, some, 0, batch_tokens=2 * 23)
    assert seen == [(1, 20), (2, 3), (2, 3), (1, 3)]


@pytest.mark.parametrize("some", [rows(0, (5, 3)), rows(6, (0, 4)), rows(6, (4,)), rows(6, (0, 0, 0)), [[7], [7, 8]]])
def test_edge_cases(some):
    """No shared token, a row that is only the prefix, a single row, equal rows, a row of one token."""
    lm = lively(FAMILIES["olmo"])
    got = last_hidden(lm, some, 0, batch_tokens=100) @ lm.head.T
    torch.testing.assert_close(got, torch.stack([alone(lm, row) for row in some]), atol=1e-4, rtol=1e-4)


def test_common_prefix_leaves_each_row_a_token():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 4], [1, 2, 3]]) == 2
    assert common_prefix([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix([[1, 2, 3]]) == 2
    assert common_prefix([[1], [2]]) == 0
    assert common_prefix([[1, 2, 5], [1, 3, 0], [1, 2, 6]]) == 1
