"""Fingerprints of models and tokenizers: two with the same fingerprints assign every text the same log-probabilities.

A model's identity is its weights, its tokenizer and the part of its config that affects what it computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_config
from neko_lean.models.trust import read_config
from neko_lean.models.weight_files import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys of a config that do not affect the log-probabilities of a causal language model in evaluation mode.
_NO_EFFECT = {
    # Names, versions and origin.
    "name_or_path", "architectures", "transformers_version", "torchscript", "auto_map", "commit_hash", "problem_type",
    "task_specific_params", "tokenizer_class", "finetuning_task", "license", "unsloth_fixed", "unsloth_version",
    "transformers.js_config",
    # How it is stored and run, which neko-lean decides itself.
    "dtype", "torch_dtype", "use_cache", "attn_implementation", "attn_implementation_internal", "use_flash_attn",
    "experts_implementation", "gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp", "device_map",
    # Outputs other than logits.
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "id2label", "label2id",
    "num_labels", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    # Initialisation and training.
    "initializer_range", "initializer_factor", "init_std", "rescale_prenorm_residual", "router_aux_loss_coef",
    "aux_loss_alpha", "router_z_loss_coef", "z_loss_coefficient",
    # Parts that text inputs never reach.
    "vision_config", "audio_config", "image_token_id", "image_token_index", "video_token_id", "audio_token_id",
    "boi_token_id", "eoi_token_id", "boi_token_index", "eoi_token_index", "mm_tokens_per_image",
    # Special tokens: the tokenizer and generation_config.json decide.
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "forced_eos_token_id",
}  # fmt: skip

# Parts of the names of keys that have an effect in training mode only.
_TRAINING_ONLY = ("dropout", "pdrop", "drop_rate", "layerdrop", "jitter_noise")

# Model types that compute positions from the id of the padding token.
_POSITIONS_FROM_PADDING = {"xglm"}

# Limits for `config_differences`: number of keys, and characters of a key or a value.
MAX_DIFFERENCES = 5
MAX_CHARACTERS = 60


@dataclass(frozen=True)
class ModelIdentity:
    """What identifies a model: two models with equal identities assign every text the same log-probabilities."""

    weights: str  # weights_fingerprint
    tokenizer: str  # tokenizer_fingerprint
    config: dict[str, Any] | None  # model_config; None if written by a version that did not record it


def identify(folder: Path, tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
    """The identity of a checkpoint folder and its tokenizer. Raises NekoLeanError if a file cannot be read."""
    return ModelIdentity(weights_fingerprint(folder), tokenizer_fingerprint(tokenizer), model_config(folder))


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every tensor, however they are distributed over files.

    Raises:
        NekoLeanError: a file is not readable safetensors.
    """
    file_of: dict[str, Path] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                file_of.update(dict.fromkeys(tensors.keys(), file))
        except Exception as error:
            raise NekoLeanError(
                f"{file} is not a readable safetensors file ({error}); download the checkpoint again."
            ) from error

    digest = hashlib.sha256()
    for name in sorted(file_of):
        with safe_open(file_of[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what turns text into ids: the JSON of a fast tokenizer, or the vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        description = json.loads(backend.to_str())
        # Padding and truncation are left over from the last call; they are not part of the tokenizer.
        description["padding"] = description["truncation"] = None
        text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def model_config(folder: Path, *, training: bool = False) -> dict[str, Any]:
    """The part of a checkpoint's config.json that affects what the model computes, as JSON values.

    It is read through transformers' config class: a default that is stated equals one that is left out, and old
    names of keys are mapped to new ones. Values that disable something (None, False) are left out, so that a key
    that a later version of transformers adds does not change the result.

    Args:
        folder: folder with config.json.
        training: include dropout rates, which only affect training.

    Raises:
        NekoLeanError: config.json cannot be read.
    """
    config = load_config(folder)
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=_as_json, sort_keys=True))
    # The quantisation of the weights, which load_config drops.
    values["quantization_config"] = read_config(folder).get("quantization_config")

    effective = _effective_values(values, () if training else _TRAINING_ONLY)
    if values.get("model_type") in _POSITIONS_FROM_PADDING:
        effective["pad_token_id"] = values.get("pad_token_id")
    return effective


def _as_json(value: object) -> Any:
    """A JSON value for a value that JSON lacks."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _effective_values(values: Mapping[str, Any], ignored_parts: Sequence[str]) -> dict[str, Any]:
    effective = {}
    for key, value in sorted(values.items()):
        name = key.lstrip("_")
        if name in _NO_EFFECT or any(part in name for part in ignored_parts) or value is None or value is False:
            continue
        effective[key] = _effective_values(value, ignored_parts) if isinstance(value, dict) else value
    return effective


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two results of `model_config` differ, with both values: 'rms_norm_eps (1e-05, now 1e-06)'.

    At most MAX_DIFFERENCES are named; if there are more, the last entry counts the rest.
    """
    old_values, new_values = dict(_flatten(old)), dict(_flatten(new))
    keys = [
        key
        for key in sorted({*old_values, *new_values})
        if _format(old_values, key, None) != _format(new_values, key, None)
    ]
    named = [
        f"{key[:MAX_CHARACTERS]} ({_format(old_values, key)}, now {_format(new_values, key)})"
        for key in keys[:MAX_DIFFERENCES]
    ]
    return [*named, f"{len(keys) - MAX_DIFFERENCES} more"] if len(keys) > MAX_DIFFERENCES else named


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values with dotted keys: rope_parameters.rope_theta."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _format(values: Mapping[str, Any], key: str, limit: int | None = MAX_CHARACTERS) -> str:
    text = json.dumps(values[key]) if key in values else "not set"
    return text if limit is None or len(text) <= limit else f"{text[: limit - 3]}..."
