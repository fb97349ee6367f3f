"""Every family decodes the tokens of transformers' greedy `generate`, and the probes detect wrong decoding methods."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.scoring import decoding, decoding_probe
from neko_lean.scoring.decoding import Prompts
from neko_lean.scoring.decoding_probe import (
    CACHED,
    CACHED_ALONE,
    FULL,
    PADDED,
    batch_length_limit,
    decode_exactly,
    keeps_only_keys_and_values,
    pick_method,
)

VOCABULARY = 60
ENDS = (7, 21, 33, 48)
PROMPTS = [[5, 9], [11, 3, 40, 8, 59, 6], [19, 4, 27, 5, 50, 33], list(range(3, 24)), list(range(40, 19, -1))]
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {
    "llama": (PADDED, ATTENTION),
    "mpt": (PADDED, {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}),  # ALiBi, takes no positions
    "mixtral": (PADDED, {**ATTENTION, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bart": (CACHED, {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4}),
    "mamba2": (CACHED, {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "jamba": (CACHED, {**ATTENTION, **JAMBA, "num_experts": 2}),
    "qwen3_next": (
        CACHED,
        {**ATTENTION, **LINEAR, **MIXED, **EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16},
    ),
    "lfm2": (CACHED, {**ATTENTION, "layer_types": ["conv", "full_attention"]}),
    "rwkv": (CACHED_ALONE, {"attention_hidden_size": 32}),  # mixes the states of a batch
    "blenderbot-small": (FULL, {"d_model": 32, "decoder_layers": 3, "encoder_layers": 1, "decoder_attention_heads": 4}),
}
RECURRENT_GEMMA = {**ATTENTION, "block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8}


def lively(family, dtype=torch.float32, **sizes):
    """A random model whose next token depends on every previous token, with no near ties."""
    shared = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
    if family == "blenderbot-small":  # there, it is that of the encoder
        shared.pop("num_hidden_layers")
    config = AutoConfig.for_model(family, **shared, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(3)
    return as_causal_lm(model)


@pytest.mark.parametrize("family", ["mamba2", "jamba", "qwen3_next", "lfm2", "recurrent_gemma"])
def test_a_recurrent_state_is_known_without_a_probe(family):
    """Also one that is kept in the model's modules instead of the cache."""
    sizes = FAMILIES[family][1] if family in FAMILIES else RECURRENT_GEMMA
    assert not keeps_only_keys_and_values(lively(family, **sizes))


def decoded(lm, prompts=PROMPTS, most=10):
    """Greedy token ids of each prompt, up to and including one of ENDS."""
    found = [[] for _ in prompts]

    def choose(rows, scores):
        for row, token in zip(rows, scores.argmax(1).tolist(), strict=True):
            found[row].append(token)
        return [None if found[row][-1] in ENDS else found[row][-1] for row in rows]

    decode_exactly(lm, Prompts(prompts, 0, most), choose)
    return found


def generated(lm, prompts=PROMPTS, most=10):
    """The reference: transformers' `generate`, one row at a time."""
    config = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=list(ENDS), pad_token_id=0)
    lm.model.generation_config = GenerationConfig()
    return [lm.model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist() for ids in prompts]


def without_cache(lm, prompts=PROMPTS, most=10):
    """The reference for families whose `generate` raises."""
    found = []
    for ids in prompts:
        new = []
        while len(new) < most and not set(new) & set(ENDS):
            with torch.no_grad():
                new.append(int(lm.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
        found.append(new)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_equal_those_of_generate(family):
    method, sizes = FAMILIES[family]
    lm = lively(family, **sizes)
    lm.model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=9, eos_token_id=11, num_beams=3
    )
    before = lm.model.generation_config
    found = decoded(lm)
    assert lm.model.generation_config is before
    assert pick_method(lm, 0, 40) is method
    assert found == (without_cache(lm) if method is FULL else generated(lm))
    assert len({len(tokens) for tokens in found}) > 1 or len({tuple(tokens) for tokens in found}) > 2


def reversed_rows(cache, indices):
    for layer in cache.layers:
        layer.batch_select_indices(indices.flip(0))


def padding_seen(rows, pad_id, device, *, left=False):
    ids, mask = pad(rows, pad_id, device, left=left)
    return ids, torch.ones_like(mask)


pad = decoding.pad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("owner", "name", "wrong"), [(Cache, "batch_select_indices", reversed_rows), (decoding, "pad", padding_seen)]
)
def test_wrong_padded_batches_are_detected(monkeypatch, dtype, owner, name, wrong):
    assert pick_method(lively("llama", dtype, **ATTENTION), 0, 40) is PADDED
    monkeypatch.setattr(owner, name, wrong)
    assert pick_method(lively("llama", dtype, **ATTENTION), 0, 40) is CACHED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lost_state_is_detected(monkeypatch, dtype):
    lm = lively("llama", dtype, **ATTENTION)
    forward = type(lm.model).forward

    def forgetful(self, *args, past_key_values=None, **kwargs):
        return forward(self, *args, past_key_values=None, **kwargs)

    monkeypatch.setattr(type(lm.model), "forward", forgetful)
    assert not decoding_probe._caches_exactly(lm, 0, 3) and not decoding_probe._caches_exactly(lm, 0, 1)


def test_each_model_is_probed_once(monkeypatch):
    lm, calls = lively("llama", **ATTENTION), []
    monkeypatch.setattr(decoding_probe, "_pads_exactly", lambda *args: calls.append(args) or True)
    assert pick_method(lm, 0, 40) is pick_method(lm, 0, 50) is PADDED and len(calls) == 1
    assert pick_method(lively("llama", **ATTENTION), 0, 40) is PADDED and len(calls) == 2


def test_probe_restores_training_mode():
    lm = lively("llama", **ATTENTION)
    lm.model.train()
    assert pick_method(lm, 0, 40) is PADDED and lm.model.training


def test_length_limit_of_rescaled_rotary_embeddings():
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 26,
        "short_factor": [1.0] * 4, "long_factor": [9.0] * 4,
    }  # fmt: skip
    lm = lively("phi3", **ATTENTION, rope_parameters=rope, original_max_position_embeddings=26)
    assert batch_length_limit(lm) == 26
    assert pick_method(lm, 0, 26) is PADDED and pick_method(lm, 0, 27) is CACHED
    assert decoded(lm) == generated(lm)
    assert batch_length_limit(lively("llama", **ATTENTION)) == float("inf")
