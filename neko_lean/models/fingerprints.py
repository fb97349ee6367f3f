"""What makes two models, or two tokenizers, the same: their weights, what of their config decides the function, and
how text becomes tokens.
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


# Keys of a config that change no log-probability of a causal language model in eval mode.
_NO_EFFECT = {
    # Names, versions, and where it came from.
    "name_or_path", "architectures", "transformers_version", "torchscript", "auto_map", "commit_hash", "problem_type",
    "task_specific_params", "tokenizer_class", "finetuning_task", "license", "unsloth_fixed", "unsloth_version",
    "transformers.js_config",
    # How it is held and run: what the weights are, and neko-lean chooses itself.
    "dtype", "torch_dtype", "use_cache", "attn_implementation", "attn_implementation_internal", "use_flash_attn",
    "experts_implementation", "gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp", "device_map",
    # What it returns besides logits.
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "id2label", "label2id",
    "num_labels", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    # How it was made, or trained.
    "initializer_range", "initializer_factor", "init_std", "rescale_prenorm_residual", "router_aux_loss_coef",
    "aux_loss_alpha", "router_z_loss_coef", "z_loss_coefficient",
    # Parts that a text never reaches.
    "vision_config", "audio_config", "image_token_id", "image_token_index", "video_token_id", "audio_token_id",
    "boi_token_id", "eoi_token_id", "boi_token_index", "eoi_token_index", "mm_tokens_per_image",
    # Which token ends or pads: the tokenizer and generation_config.json say so.
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "forced_eos_token_id",
}  # fmt: skip


_TRAINING_ONLY = ("dropout", "pdrop", "drop_rate", "layerdrop", "jitter_noise")  # parts of names


# Models that count their positions from the padding token's id.
_POSITIONS_FROM_PADDING = {"xglm"}


MOST_NAMED = 5  # differences in one sentence


LONGEST = 60  # characters of a key or a value there


@dataclass(frozen=True)
class ModelIdentity:
    """By what a model is known again: two with the same identity give every text the same log-probabilities."""

    weights: str  # of weights_fingerprint
    tokenizer: str  # of tokenizer_fingerprint
    config: dict[str, Any] | None  # of model_config; None: written down by a version that did not look at it


def identify(folder: Path, tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
    """The identity of a checkpoint folder and its tokenizer. Raises NekoLeanError when a file cannot be read."""
    return ModelIdentity(weights_fingerprint(folder), tokenizer_fingerprint(tokenizer), model_config(folder))


def model_config(folder: Path, *, training: bool = False) -> dict[str, Any]:
    """What of a checkpoint's config.json changes the function that the model computes, as JSON holds it.

    Read through transformers' own class, so that a default that is stated equals one that is left out, and an old key's
    value stands under its new name. Values that switch something off (None, False) are left out, so that a key that a
    later version of transformers adds does not make two models of one.

    With `training` the rates of dropout count too. Raises NekoLeanError when config.json cannot be read.
    """
    config = load_config(folder)
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=_plain, sort_keys=True))
    # How packed weights become numbers. load_config leaves it out, as a new model has none.
    packed = read_config(folder).get("quantization_config")
    found = _effective(values | {"quantization_config": packed}, () if training else _TRAINING_ONLY)
    if values.get("model_type") in _POSITIONS_FROM_PADDING:
        found["pad_token_id"] = values.get("pad_token_id")
    return found


def _plain(value: object) -> Any:
    """A value that JSON does not have."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _effective(values: Mapping[str, Any], ignored_parts: Sequence[str]) -> dict[str, Any]:
    kept = {}
    for key, value in sorted(values.items()):
        name = key.lstrip("_")
        if name in _NO_EFFECT or any(part in name for part in ignored_parts) or value is None or value is False:
            continue
        kept[key] = _effective(value, ignored_parts) if isinstance(value, dict) else value
    return kept


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two results of `model_config` differ, each with both values: 'rms_norm_eps (1e-05, now 1e-06)'.

    At most five are named; the last entry then says how many more there are.
    """
    one, two = dict(_flat(old)), dict(_flat(new))
    keys = [key for key in sorted({*one, *two}) if _shown(one, key, None) != _shown(two, key, None)]
    named = [f"{key[:LONGEST]} ({_shown(one, key)}, now {_shown(two, key)})" for key in keys[:MOST_NAMED]]
    return [*named, f"{len(keys) - MOST_NAMED} more"] if len(keys) > MOST_NAMED else named


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values with the way to them: rope_parameters.rope_theta."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _shown(values: Mapping[str, Any], key: str, longest: int | None = LONGEST) -> str:
    text = json.dumps(values[key]) if key in values else "not set"
    return text if longest is None or len(text) <= longest else f"{text[: longest - 3]}..."


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes: the same weights match wherever they lie."""
    digest = hashlib.sha256()
    found: dict[str, Path] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                found.update(dict.fromkeys(tensors.keys(), file))
        except Exception as error:
            raise NekoLeanError(f"{file} is not a readable safetensors file ({error}).") from error
    for name in sorted(found):
        with safe_open(found[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what turns text into ids: the fast tokenizer's own description, or the vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        description = json.loads(backend.to_str())
        # Padding and truncation are how somebody called it last, not what it is.
        description["padding"] = description["truncation"] = None
        text = json.dumps(description, sort_keys=True)
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
