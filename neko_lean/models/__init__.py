"""Causal language models: load and check a checkpoint, split it into backbone and head, fingerprint it."""

from neko_lean.models.causal_lm import (
    CausalLM,
    checkpoint_activations,
    next_token_logp,
    next_token_stats,
    position_limit,
    supports_packing,
)
from neko_lean.models.chunked_head import CHUNK_ELEMENTS, logits, token_stats
from neko_lean.models.devices import (
    check_seed,
    has_bfloat16,
    peak_memory,
    pick_device,
    pick_dtype,
    reset_peak_memory,
    resident_memory,
    trim_memory,
    warn_emulated_bfloat16,
)
from neko_lean.models.families import find_backbone, reset_output_switches, stated_softcap
from neko_lean.models.fingerprints import (
    ModelIdentity,
    config_differences,
    identify,
    model_config,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from neko_lean.models.finite import greedy_tokens, refuse_non_finite_outputs
from neko_lean.models.generation_config import eos_token_ids, stated_eos_token_id, unknown_eos_token_ids
from neko_lean.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    model_folder,
    model_name,
    new_model,
    usable_length,
)
from neko_lean.models.positions import rescaling_length, stated_positions
from neko_lean.models.quantized import quantization_method
from neko_lean.models.sharding import ShardedModel, local_shard, save_checkpoint
from neko_lean.models.trust import is_inside, read_config
from neko_lean.models.vocabulary import refuse_unknown_examples, refuse_unknown_ids
from neko_lean.models.weight_files import holds_weights

__all__ = [
    "CHUNK_ELEMENTS",
    "CausalLM",
    "ModelIdentity",
    "ShardedModel",
    "check_seed",
    "checkpoint_activations",
    "config_differences",
    "eos_token_ids",
    "find_backbone",
    "greedy_tokens",
    "has_bfloat16",
    "holds_weights",
    "identify",
    "is_inside",
    "load_config",
    "load_model",
    "load_tokenizer",
    "local_shard",
    "logits",
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
    "stated_softcap",
    "supports_packing",
    "token_stats",
    "tokenizer_fingerprint",
    "trim_memory",
    "unknown_eos_token_ids",
    "usable_length",
    "warn_emulated_bfloat16",
    "weights_fingerprint",
]
