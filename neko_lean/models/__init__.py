"""Causal language models: load and check a checkpoint, split it into backbone and head, fingerprint it."""

from neko_lean.models.adapters import add_adapters, has_adapters
from neko_lean.models.causal_lm import CausalLM, as_causal_lm, checkpoint_activations, position_limit
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.devices import check_seed, has_bfloat16, pick_device, pick_dtype, warn_emulated_bfloat16
from neko_lean.models.families import config_softcap, find_backbone, reset_output_switches
from neko_lean.models.fingerprints import (
    ModelIdentity,
    config_differences,
    identify,
    model_config,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from neko_lean.models.finite import greedy_tokens, refuse_non_finite_outputs
from neko_lean.models.four_bit import dequantize_4bit
from neko_lean.models.generation_config import eos_token_ids, stated_eos_token_id, unknown_eos_token_ids
from neko_lean.models.lm_head import CHUNK_ELEMENTS, logits
from neko_lean.models.loaded import accepts_loaded_model
from neko_lean.models.loading import (
    Model,
    load_config,
    load_model,
    load_tokenizer,
    model_folder,
    model_name,
    new_model,
    usable_length,
)
from neko_lean.models.memory_use import memory_in_use, peak_memory, reset_peak_memory, resident_memory, trim_memory
from neko_lean.models.packing import supports_packing
from neko_lean.models.positions import rescaling_length, stated_positions
from neko_lean.models.predictions import next_token_logp, next_token_stats
from neko_lean.models.quantized import quantization_method
from neko_lean.models.quantized_base import QuantizedLinear, quantize_base, quantized_parameters
from neko_lean.models.sharding import ShardedModel, check_sharding, local_shard, save_checkpoint
from neko_lean.models.trust import is_inside, read_config
from neko_lean.models.vocabulary import refuse_unknown_examples, refuse_unknown_ids
from neko_lean.models.weight_files import holds_weights

__all__ = [
    "CHUNK_ELEMENTS",
    "CausalLM",
    "Model",
    "ModelIdentity",
    "QuantizedLinear",
    "ShardedModel",
    "accepts_loaded_model",
    "add_adapters",
    "as_causal_lm",
    "check_seed",
    "check_sharding",
    "checkpoint_activations",
    "config_differences",
    "config_softcap",
    "dequantize_4bit",
    "eos_token_ids",
    "find_backbone",
    "greedy_tokens",
    "has_adapters",
    "has_bfloat16",
    "holds_weights",
    "identify",
    "is_inside",
    "load_config",
    "load_model",
    "load_tokenizer",
    "local_shard",
    "logits",
    "memory_in_use",
    "model_config",
    "model_folder",
    "model_name",
    "new_model",
    "next_token_logp",
    "next_token_stats",
    "peak_memory",
    "pick_device",
    "pick_dtype",
    "position_limit",
    "quantization_method",
    "quantize_base",
    "quantized_parameters",
    "read_config",
    "refuse_non_finite_outputs",
    "refuse_unknown_examples",
    "refuse_unknown_ids",
    "rescaling_length",
    "reset_output_switches",
    "reset_peak_memory",
    "resident_memory",
    "save_checkpoint",
    "stated_eos_token_id",
    "stated_positions",
    "supports_packing",
    "token_stats",
    "tokenizer_fingerprint",
    "trim_memory",
    "unknown_eos_token_ids",
    "usable_length",
    "warn_emulated_bfloat16",
    "weights_fingerprint",
]
