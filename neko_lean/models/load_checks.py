"""Whether the weights that were loaded are the checkpoint's: every tensor is there, has its shape, and is finite.

transformers fills a tensor that it does not find with random numbers, and leaves out one that it does not know. Here
both are errors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError
from neko_lean.terminal import log_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from neko_lean.models.weight_files import _QUANTIZED, PLAIN_DTYPES, Differences, StoredTensor, _listed, _names_of, _some

_NUMBERED = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.")


# Buffers that older versions of transformers saved and newer ones compute: masks, rotary frequencies and positions.
_OLD_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|causal_mask|inv_freq|cos_cached|sin_cached|position_ids|embed_positions\.(weights|_float_tensor))$"
)


_MULTIMODAL = re.compile(r"vision|visual|audio|multi_modal|mm_projector|image|speech")


def check_loaded(
    model: PreTrainedModel,
    folder: Path,
    stored: Mapping[str, StoredTensor],
    info: Mapping[str, Any],
    *,
    packed: bool = False,
) -> None:
    """Raise NekoLeanError unless the model's weights are exactly those of the files, and finite.

    Args:
        model: what transformers loaded with `ignore_mismatched_sizes`.
        stored: what the files hold, by name.
        info: transformers' loading info. What it leaves out on purpose, such as tied weights and old buffers, is
            neither missing nor unexpected there.
        packed: whether config.json says that the weights are quantised, and they were dequantised.
    """
    found = Differences(
        sorted(info["missing_keys"]),
        sorted(name for name in info["unexpected_keys"] if not _is_old_buffer(name, model.base_model_prefix, stored)),
        sorted((name, tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"]),
    )
    if found:
        raise NekoLeanError(
            f"the weights in {folder} are not those of the {type(model).__name__} that its config.json describes: "
            f"{_listed(found)}. {diagnosis(found, model)}"
        )
    _refuse_twice(model, folder, stored)
    _warn_dropped(model, stored)
    if not packed:
        refuse_integers(model, stored)
    untie_where_stored(model, folder)
    refuse_broken_weights(model, folder)


def _is_old_buffer(name: str, base_prefix: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor that the model does not have is one that needs not be loaded: it is the same for all weights."""
    tensor = stored.get(name) or stored.get(name.removeprefix(f"{base_prefix}."))
    is_mask = tensor is not None and name.endswith(".bias") and tensor.shape[:2] == (1, 1) and len(tensor.shape) == 4
    return is_mask or _OLD_BUFFERS.search(name) is not None


def diagnosis(found: Differences, model: PreTrainedModel) -> str:
    """What such differences look like and what to do, in a sentence."""
    unexpected = found.unexpected
    for mark, sentence in (
        ("_orig_mod.", "This looks like a model saved under torch.compile: save its _orig_mod instead."),
        ("base_layer.", "This looks like an adapter that was not merged: call merge_and_unload() and save again."),
        ("lora_", "This looks like an adapter that was not merged: call merge_and_unload() and save again."),
        ("modules_to_save.", "This looks like an adapter that was not merged: call merge_and_unload() and save again."),
        ("_fsdp_wrapped_module.", "This looks like a model saved inside FSDP: save the model that it wraps."),
        ("_checkpoint_wrapped_module.", "This looks like wrapped layers: save the model without the wrapper."),
    ):
        if any(mark in name for name in unexpected):
            return sentence
    if any(_QUANTIZED.search(name) for name in unexpected):
        return "This looks like a quantised checkpoint: give it in bfloat16, float16 or float32."
    if any(_MULTIMODAL.search(name) for name in unexpected):
        return (
            "This looks like a multimodal model with a config.json of its language part: give the config.json of the "
            "whole model, or the language part's weights alone."
        )
    prefix = _wrapper(found, model.base_model_prefix)
    if prefix == "module.":
        return "This looks like a model saved inside DistributedDataParallel: save its .module instead."
    if prefix:
        return f"This looks like a model inside another one: remove {prefix!r} from the tensors' names."
    layers = _layer_count(found, model)
    if layers:
        return layers
    if found.mismatched and not found.missing and not unexpected:
        return _other_shape(found, model)
    if found.missing and not unexpected and set(found.missing) <= _head_names(model):
        return (
            "This looks like a base model without its head: give the causal language model, or, if its head is the "
            "embedding, set tie_word_embeddings to true in config.json."
        )
    return "Give a config.json and weights of the same model."


def _wrapper(found: Differences, base_prefix: str) -> str:
    """The prefix that the unexpected names have over the missing ones; '' where it is none of most of them."""
    wanted = {*found.missing, *(name.removeprefix(f"{base_prefix}.") for name in found.missing)}
    for name in found.unexpected:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in wanted:
                prefix = ".".join(parts[:cut]) + "."
                if 2 * sum(one.startswith(prefix) for one in found.unexpected) >= len(found.unexpected):
                    return prefix
    return ""


def _layers(names: Collection[str]) -> set[int]:
    return {int(match[1]) for match in map(_NUMBERED.search, names) if match}


def _layer_count(found: Differences, model: PreTrainedModel) -> str:
    """What to say where whole layers are missing or surplus, and nothing else; else ''."""
    config = model.config.get_text_config(decoder=True)
    count, key = getattr(config, "num_hidden_layers", None), config.attribute_map.get("num_hidden_layers")
    key = key or "num_hidden_layers"
    if not isinstance(count, int) or found.mismatched:
        return ""
    missing, surplus = _layers(found.missing), _layers(found.unexpected)
    if surplus and not found.missing and min(surplus) >= count and all(map(_NUMBERED.search, found.unexpected)):
        return f"The files hold {max(surplus) + 1} layers, and config.json says {key}: {count}."
    if missing and not found.unexpected and all(map(_NUMBERED.search, found.missing)):
        wanted = [name for name in model.state_dict() if _layers([name]) & missing]
        if len(wanted) == len(found.missing) and missing == set(range(min(missing), count)):
            return f"The files hold only {min(missing)} of the {count} layers that config.json says ({key})."
        return f"The files lack weights of layer {min(missing)}: get the checkpoint again."
    return ""


def _other_shape(found: Differences, model: PreTrainedModel) -> str:
    """What to say where only shapes differ."""
    tables = _table_names(model)
    rows = [
        (there[0], here[0]) for name, there, here in found.mismatched if name in tables and there[1:] == here[1:] != ()
    ]
    if rows and len(rows) == len(found.mismatched):
        return f"The files have a vocabulary of {rows[0][0]} entries, and config.json says vocab_size: {rows[0][1]}."
    return "The sizes in config.json are those of another model: give the config.json that belongs to the weights."


def _head_names(model: PreTrainedModel) -> set[str]:
    return _names_of(model, model.get_output_embeddings())


def _table_names(model: PreTrainedModel) -> set[str]:
    return _head_names(model) | _names_of(model, model.get_input_embeddings())


def _refuse_twice(model: PreTrainedModel, folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Raise NekoLeanError where one of the model's tensors is stored with and without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    for name in sorted(stored):
        if name.startswith(prefix) and (short := name.removeprefix(prefix)) in stored:
            raise NekoLeanError(
                f"{folder} holds both {short} and {name}, which are the same tensor of the model: get the checkpoint "
                f"again, or remove the one that is not meant."
            )


def _warn_dropped(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Say which tensors transformers leaves out on purpose, such as a vision tower: what is saved will lack them."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    own = model.state_dict().keys()
    dropped = [
        name
        for name, tensor in sorted(stored.items())
        if name not in own
        and tensor.dtype in PLAIN_DTYPES
        and any(pattern.search(name) for pattern in patterns)
        and not _is_old_buffer(name, model.base_model_prefix, stored)
    ]
    if dropped:
        log_line(
            f"warning: {len(dropped)} tensors of the checkpoint are not part of {type(model).__name__}, and "
            f"checkpoints written from it will lack them: {_some(dropped, 3)}."
        )


def refuse_integers(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Raise NekoLeanError when integers were stored where the model has a weight: they need scales to be read."""
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = stored.get(name) or stored.get(name.removeprefix(prefix)) or stored.get(prefix + name)
        if tensor is not None and tensor.dtype not in PLAIN_DTYPES and parameter.is_floating_point():
            raise NekoLeanError(
                f"{tensor.file} holds {name} as {tensor.dtype}, and the model has a weight there: give the checkpoint "
                f"in bfloat16, float16 or float32."
            )


def untie_where_stored(model: PreTrainedModel, folder: Path) -> None:
    """Make the config say the truth where it ties the head to the embedding, but the files hold both and they differ.

    transformers then loads both. A config that went on saying that they are one would have other programs drop the head
    of what is saved.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    untied = sorted(tied.keys() - model.all_tied_weights_keys.keys())
    if not untied:
        return
    if len(untied) < len(tied):
        raise NekoLeanError(
            f"{folder} holds {_some(untied)} with other values than {tied[untied[0]]}, though config.json says "
            f"they are one tensor: set tie_word_embeddings to false there, or remove the one that is not meant."
        )
    for config in {id(one): one for one in (model.config, model.config.get_text_config(decoder=True))}.values():
        config.tie_word_embeddings = False
    log_line(
        f"warning: {folder / 'config.json'} ties {_some(untied)} to {tied[untied[0]]}, but the weights hold both and "
        f"they differ: both are kept, and what is saved says tie_word_embeddings: false."
    )


@torch.no_grad()
def refuse_broken_weights(model: PreTrainedModel, folder: Path) -> None:
    """Raise NekoLeanError naming the first tensor of the model that holds a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NekoLeanError(
                f"{name} in {folder} holds NaN or infinite values as {str(tensor.dtype).removeprefix('torch.')}: the "
                f"checkpoint is damaged or its training diverged, so give an earlier one."
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floating-point numbers holds neither NaN nor infinity; no copy of it is made."""
    if tensor.numel() == 0:
        return True
    # NaN makes both of them NaN; an infinity is one of the two.
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
