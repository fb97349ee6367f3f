"""Small random models of every causal family in transformers, for bench/families.py.

The default configuration of a family is shrunk by field name; OVERRIDES corrects what this gets wrong. Every parameter
is random, including norms, biases and gates, so that a forgotten term is detected.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MAX_PARAMETERS = 5_000_000
LOGITS_STD = 2.5  # standard deviation of a row of logits: neither flat nor one-hot

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, POSITIONS = 32, 4, 2, 8, 2, 512
# Families that cannot be built here, and why.
SKIPPED = {
    **dict.fromkeys(
        ["emu3", "mllama"],
        "AutoModelForCausalLM builds its language model and saves it with a configuration that it cannot load",
    ),
    "gemma3n": "its vision tower needs timm and pillow (gemma3n_text is the language model)",
    "gemma4_assistant": "a drafter: its forward takes another model's hidden states, not token ids",
    "gemma4_unified_assistant": "a drafter: its forward takes another model's hidden states, not token ids",
    "musicgen": "AutoModelForCausalLM cannot build it from its own configuration; it speaks audio codes",
    "musicgen_melody": "AutoModelForCausalLM cannot build it from its own configuration; it speaks audio codes",
}
# Values by field name, for every family that has a field of that name.
BY_NAME: dict[str, Any] = {
    **dict.fromkeys(
        ["hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_dim", "word_embed_proj_dim",
         "input_embedding_size", "output_embedding_size", "embedding_size", "attention_hidden_size", "lru_width",
         "pronunciation_embed_dim", "shape_embed_dim", "backbone_hidden_size", "hidden_size_global"],
        HIDDEN,
    ),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks",
         "num_encoder_layers", "num_decoder_layers", "depth"],
        LAYERS,
    ),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
         "swa_num_attention_heads", "linear_num_heads"],
        HEADS,
    ),
    **dict.fromkeys(
        ["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads", "num_query_groups"],
        KV_HEADS,
    ),
    "linear_num_value_heads": 4,
    **dict.fromkeys(
        ["head_dim", "swa_head_dim", "kv_channels", "d_head", "dim_head", "attention_head_size", "linear_head_dim",
         "linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"],
        HEAD_DIM,
    ),
    **dict.fromkeys(
        ["intermediate_size", "n_inner", "dff", "dim_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim",
         "ffn_hidden_size", "d_inner", "feed_forward_size", "moe_intermediate_size", "intermediate_size_mlp",
         "shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size",
         "moe_shared_expert_intermediate_size", "dense_intermediate_size", "shared_experts_intermediate_size",
         "router_hidden_size"],
        48,
    ),
    **dict.fromkeys(
        ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"], 4
    ),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(
        ["n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts",
         "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index",
         "num_nextn_predict_layers"],
        1,
    ),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank", "gated_norm_rank", "laurel_rank"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"], POSITIONS),
    **dict.fromkeys(["max_target_positions", "max_source_positions", "model_max_length"], POSITIONS),
    **dict.fromkeys(
        ["sliding_window", "sliding_window_size", "window_size", "attention_window_size", "local_attention",
         "attention_chunk_size", "local_attention_window_len"],
        8,
    ),
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size", "mamba_dt_rank", "time_step_rank"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 4),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim"], 16),
    **dict.fromkeys(["mamba_n_groups", "mamba_ngroups", "n_groups"], 2),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size", "block_size"], 8),
    "index_block_size": 4, "index_topk_blocks": 2,
    "rotary_dim": 4, "type_vocab_size": 2, "index_head_dim": 8, "index_n_heads": 16, "index_topk": 6,
    "hidden_size_per_layer_input": 8, "num_mel_bins": 8, "image_size": 16, "patch_size": 8,
    "query_pre_attn_scalar": 8,
}  # fmt: skip
UNSET = ("head_dim", "num_key_value_heads")  # set even if the default configuration leaves them out
# Lists with the kind of each layer: one layer of each kind is kept.
LAYER_KINDS = ("layer_types", "layers_block_type", "block_types", "attn_layers")


def shrunk(config: PreTrainedConfig, vocab_size: int) -> dict[str, Any]:
    """Keyword arguments for a small configuration of the same class as `config`, a default configuration."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    kwargs: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            kwargs[name] = {"model_type": value.model_type, **shrunk(value, vocab_size)}
        elif name in BY_NAME and (value is not None or name in UNSET) and not isinstance(value, list | dict):
            kwargs[name] = BY_NAME[name]
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if name in fields:
            kwargs[name] = vocab_size
    for name in LAYER_KINDS:
        if isinstance(fields.get(name), list) and fields[name]:
            kinds = list(dict.fromkeys(fields[name]))
            kwargs[name] = kinds if len(kinds) > 1 else kinds * LAYERS
            for count in ("num_hidden_layers", "n_layer"):
                if count in fields:
                    kwargs[count] = len(kwargs[name])
    if isinstance(fields.get("mlp_layer_types"), list):
        kinds = list(dict.fromkeys(fields["mlp_layer_types"]))
        count = kwargs["num_hidden_layers"] = max(kwargs["num_hidden_layers"], len(kinds))
        kwargs["mlp_layer_types"] = (kinds * count)[:count]
        if isinstance(kwargs.get("layer_types"), list):
            kwargs["layer_types"] = (kwargs["layer_types"] * count)[:count]
    if "is_decoder" in fields:
        kwargs["is_decoder"] = True
    if "max_window_layers" in fields:
        kwargs["max_window_layers"] = 1
    return kwargs


def small_config(
    family: str, vocab_size: int, ids: Mapping[str, int], change: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """A small configuration of a family, with the tokenizer's special ids, and then `change` applied."""
    kind = CONFIG_MAPPING[family]
    kwargs = {**merged(shrunk(kind(), vocab_size), OVERRIDES.get(family, {})), **ids}
    if isinstance(kwargs.get("text_config"), dict):
        kwargs["text_config"] = {**kwargs["text_config"], **ids}
    return kind(**merged(kwargs, change or {}))


def merged(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated with `update`; nested dictionaries are merged."""
    result = dict(base)
    for name, value in update.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both else value
    return result


_QSA = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 2, "heads_per_ngram": 2, "ple_embed_dim": 32}  # fmt: skip
_MLA = {"num_key_value_heads": HEADS, "qk_head_dim": 16}
_DOTS3 = {**_MLA, "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8,
          "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}  # fmt: skip
# Further values that the shrunk configuration of a family needs.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_linear",
         "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"],
        _MLA,
    ),
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": _DOTS3,
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
                   "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "feature_size": 8}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    **dict.fromkeys(["qwen4_exp_text"], _QSA), "qwen4_exp": {"text_config": _QSA},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "n_mamba_heads": 2,
              "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
              "num_hidden_layers": 4},
    "zamba2": {"num_key_value_heads": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
               "num_hidden_layers": 4, "adapter_rank": 8, "num_mem_blocks": 2, "attention_hidden_size": 64,
               "attention_head_dim": 16, "num_query_groups": 4},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4, "output_logit_soft_cap": 3.0},
    "blt": {"encoder_hash_byte_group_vocab": 500,
            **{name: {"num_key_value_heads": HEADS} for name in ("encoder_config", "decoder_config",
                                                                "global_config", "patcher_config")}},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "logits_scaling": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "key_multiplier": 0.7, "ssm_in_multiplier": 1.3},
    "mamba2": {"head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True, "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (16, 16),
                 "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
                 "num_buckets": 4, "hash_seed": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
                     "num_kv_shared_layers": 2, "intermediate_size": 48, "final_logit_softcapping": 3.0},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4,
                                                                   "mrope_section": [2, 1, 1]}}},
    "zaya": {"num_experts_per_tok": 1},
    "xlm": {"causal": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "gemma4_text": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.4},
    "cohere2": {"logit_scale": 0.4},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 1.5},
    "granitemoe": {"logits_scaling": 2.0},
    "granitemoeshared": {"logits_scaling": 2.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
}  # fmt: skip


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A float32 model in evaluation mode with random values in every parameter and widely spread logits."""
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"the smallest model has {count} parameters; at most {MAX_PARAMETERS} are allowed")
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).float().eval()
    model.config.return_dict = True  # with False, transformers' own forward fails
    randomise(model)
    spread(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Set values that no initialisation has: matrices of the usual scale, all else moved away from its default."""
    vocab_size = len(model.get_output_embeddings().weight) if model.get_output_embeddings() is not None else 0
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim > 1 and parameter.mean().abs() < 0.05 and parameter.std() < 0.05:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        elif parameter.shape == (vocab_size,):  # the bias of the logits
            parameter.copy_(noise)
        else:
            parameter.add_(0.2 * noise)
    saved = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point() and "bias" in name:
            buffer.add_(0.05 * torch.randn_like(buffer))


@torch.no_grad()
def spread(model: PreTrainedModel) -> None:
    """Scale the head until the logits have a standard deviation near LOGITS_STD, or reach the soft cap."""
    head = model.get_output_embeddings()
    if head is None:
        return
    ids = torch.arange(3, 35)[None] * 7 % (len(head.weight) - 3) + 3
    target = LOGITS_STD if cap(model.config) is None else 0.6 * cap(model.config)
    for _ in range(3):
        std = float(plain_logits(model, ids).std(-1).mean())
        head.weight.mul_(min(8.0, max(0.125, target / max(std, 1e-6))))


def cap(config: PreTrainedConfig) -> float | None:
    """The soft cap of a model's logits, or None."""
    text = config.get_text_config(decoder=True)
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_softcapping")
    return next((float(getattr(text, name)) for name in names if getattr(text, name, None)), None)


def plain_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, L, V] in float32 from the model's own forward: no mask, no padding, no cache."""
    kwargs = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    out = model(input_ids=ids, **kwargs)
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return logits.float()
