"""Checks after loading: every tensor of the checkpoint is in the model, has the right shape and is finite.

transformers initialises tensors that it does not find at random, and drops tensors that it does not know. Here both
are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError
from neko_lean.models.load_diagnosis import Differences, diagnose
from neko_lean.models.weight_files import PLAIN_DTYPES, StoredTensor, first_names
from neko_lean.terminal import log_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Buffers that older versions of transformers saved and newer ones compute: masks, rotary frequencies and positions.
_OLD_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|causal_mask|inv_freq|cos_cached|sin_cached|position_ids|embed_positions\.(weights|_float_tensor))$"
)


def check_loaded(
    model: PreTrainedModel,
    folder: Path,
    stored: Mapping[str, StoredTensor],
    info: Mapping[str, Any],
    *,
    dequantized: bool = False,
) -> None:
    """Check that the model's weights are exactly those of the checkpoint's files, and finite.

    Args:
        model: the model that transformers loaded with `ignore_mismatched_sizes`.
        folder: the checkpoint folder.
        stored: the tensors in its files, by name.
        info: transformers' loading info. Tensors that it drops on purpose, such as tied weights and old buffers, are
            neither missing nor unexpected there.
        dequantized: whether the weights were stored quantised, as config.json declares, and have been dequantised.

    Raises:
        NekoLeanError: the weights differ or are not finite; the message names the tensors.
    """
    base_prefix = model.base_model_prefix
    differences = Differences(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(name for name in info["unexpected_keys"] if not _is_old_buffer(name, base_prefix, stored)),
        mismatched=sorted((name, tuple(file), tuple(expected)) for name, file, expected in info["mismatched_keys"]),
    )
    if differences:
        raise NekoLeanError(
            f"the weights in {folder} are not those of the {type(model).__name__} that its config.json describes: "
            f"{differences.describe()}. {diagnose(differences, model)}"
        )
    _refuse_duplicates(model, folder, stored)
    _warn_dropped(model, stored)
    if not dequantized:
        _refuse_integer_weights(model, stored)
    _untie_if_different(model, folder)
    _refuse_non_finite(model, folder)


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity; makes no copy of it."""
    if tensor.numel() == 0:
        return True
    # A NaN makes both of them NaN; an infinity is one of the two.
    smallest, largest = torch.aminmax(tensor)
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))


def _is_old_buffer(name: str, base_prefix: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether an unexpected tensor can be ignored, because it is a buffer that does not depend on the weights."""
    tensor = stored.get(name) or stored.get(name.removeprefix(f"{base_prefix}."))
    is_mask = tensor is not None and name.endswith(".bias") and tensor.shape[:2] == (1, 1) and len(tensor.shape) == 4
    return is_mask or _OLD_BUFFERS.search(name) is not None


def _refuse_duplicates(model: PreTrainedModel, folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Raise NekoLeanError if a tensor is stored both with and without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    for name in sorted(stored):
        if name.startswith(prefix) and (short := name.removeprefix(prefix)) in stored:
            raise NekoLeanError(
                f"{folder} holds both {short} and {name}, which are the same tensor of the model; download the "
                f"checkpoint again, or remove the wrong one."
            )


def _warn_dropped(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Warn about tensors that transformers drops on purpose, such as a vision tower."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    model_names = model.state_dict().keys()
    dropped = [
        name
        for name, tensor in sorted(stored.items())
        if name not in model_names
        and tensor.dtype in PLAIN_DTYPES
        and any(pattern.search(name) for pattern in patterns)
        and not _is_old_buffer(name, model.base_model_prefix, stored)
    ]
    if dropped:
        log_line(
            f"warning: checkpoints written from this model will lack {len(dropped)} tensors of the original, because "
            f"they are not part of {type(model).__name__}: {first_names(dropped, 3)}."
        )


def _refuse_integer_weights(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Raise NekoLeanError if a weight of the model is stored as integers, which need scales to be read."""
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = stored.get(name) or stored.get(name.removeprefix(prefix)) or stored.get(prefix + name)
        if tensor is not None and tensor.dtype not in PLAIN_DTYPES and parameter.is_floating_point():
            raise NekoLeanError(
                f"{tensor.file} holds the weight {name} as {tensor.dtype}, expected floating-point numbers; use the "
                f"checkpoint in bfloat16, float16 or float32."
            )


def _untie_if_different(model: PreTrainedModel, folder: Path) -> None:
    """Set tie_word_embeddings to false if the config ties head and embedding, but the files hold both and they differ.

    transformers then loads both. If the config still called them tied, other programs would drop the head of a saved
    checkpoint.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    untied = sorted(tied.keys() - model.all_tied_weights_keys.keys())
    if not untied:
        return
    if len(untied) < len(tied):
        raise NekoLeanError(
            f"{folder} holds {first_names(untied)} with other values than {tied[untied[0]]}, but config.json ties them "
            f"to one tensor; set tie_word_embeddings to false there, or remove the wrong tensor."
        )
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    log_line(
        f"warning: checkpoints written from this model will say tie_word_embeddings: false, because "
        f"{folder / 'config.json'} ties {first_names(untied)} to {tied[untied[0]]}, but the weights hold both and they "
        f"differ; both are kept."
    )


@torch.no_grad()
def _refuse_non_finite(model: PreTrainedModel, folder: Path) -> None:
    """Raise NekoLeanError naming the first tensor of the model that holds a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NekoLeanError(
                f"{name} in {folder} holds NaN or infinite values as {str(tensor.dtype).removeprefix('torch.')}; the "
                f"checkpoint is damaged or its training diverged, so use an earlier one."
            )
