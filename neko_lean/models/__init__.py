"""Causal language models: load and check a checkpoint, split it into backbone and head, fingerprint it."""

from neko_lean.models.causal_lm import (
    CausalLM,
    checkpoint_activations,
    next_token_logp,
    next_token_views,
    position_limit,
    supports_packing,
)
from neko_lean.models.devices import (
    check_seed,
    has_bfloat16,
    peak_memory,
    pick_device,
    pick_dtype,
    reset_peak,
    resident,
    settle,
    warn_emulated_bfloat16,
)
from neko_lean.models.families import backbone_of, plain_outputs, stated_softcap
from neko_lean.models.fingerprints import (
    ModelIdentity,
    config_differences,
    identify,
    model_config,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from neko_lean.models.finite import likeliest, refuse_broken_outputs
from neko_lean.models.generation_config import end_ids, listed_ends, unknown_ends
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
from neko_lean.models.sharding import Shards, local, save_checkpoint
from neko_lean.models.token_stats import CHUNK_ELEMENTS, logits, token_stats
from neko_lean.models.trust import is_inside, read_config
from neko_lean.models.vocabulary import refuse_unknown_ids, refuse_unknown_rows
from neko_lean.models.weight_files import holds_weights

__all__ = [
    "CHUNK_ELEMENTS",
    "CausalLM",
    "ModelIdentity",
    "Shards",
    "backbone_of",
    "check_seed",
    "checkpoint_activations",
    "config_differences",
    "end_ids",
    "has_bfloat16",
    "holds_weights",
    "identify",
    "is_inside",
    "likeliest",
    "listed_ends",
    "load_config",
    "load_model",
    "load_tokenizer",
    "local",
    "logits",
    "model_config",
    "model_folder",
    "model_name",
    "new_model",
    "next_token_logp",
    "next_token_views",
    "peak_memory",
    "pick_device",
    "pick_dtype",
    "plain_outputs",
    "position_limit",
    "quantization_method",
    "read_config",
    "refuse_broken_outputs",
    "refuse_unknown_ids",
    "refuse_unknown_rows",
    "rescaling_length",
    "reset_peak",
    "resident",
    "save_checkpoint",
    "settle",
    "stated_positions",
    "stated_softcap",
    "supports_packing",
    "token_stats",
    "tokenizer_fingerprint",
    "unknown_ends",
    "usable_length",
    "warn_emulated_bfloat16",
    "weights_fingerprint",
]
