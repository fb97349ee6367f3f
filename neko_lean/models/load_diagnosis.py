"""What went wrong if a checkpoint's tensors are not those that its config.json describes, and how to fix it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from neko_lean.models.weight_files import MAX_NAMES, first_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNMERGED_ADAPTER = "This looks like an adapter that was not merged; call merge_and_unload() and save the model again."

# Parts of tensor names that wrappers leave behind, and what to do about each.
_WRAPPER_MARKS = {
    "_orig_mod.": "This looks like a model saved under torch.compile; save its _orig_mod instead.",
    "base_layer.": _UNMERGED_ADAPTER,
    "lora_": _UNMERGED_ADAPTER,
    "modules_to_save.": _UNMERGED_ADAPTER,
    "_fsdp_wrapped_module.": "This looks like a model saved inside FSDP; save the model that it wraps.",
    "_checkpoint_wrapped_module.": "This looks like a model with wrapped layers; save it without the wrapper.",
}

_QUANTIZED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|SCB|weight_format|qweight|qzeros|g_idx|scales|zeros|weight_packed|weight_scale"
    r"|weight_scale_inv|weight_zero_point|W_q|meta|input_scale|qdata)$|quant_state|_blocks$|_scales$"
)
_MULTIMODAL = re.compile(r"vision|visual|audio|multi_modal|mm_projector|image|speech")
_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.")


@dataclass(frozen=True)
class Differences:
    """How a checkpoint's tensors differ from the model that its config.json describes; all names sorted."""

    missing: Sequence[str]  # in the model, not in the files
    unexpected: Sequence[str]  # in the files, not in the model
    mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape in the files, shape in the model

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def describe(self) -> str:
        """At most MAX_NAMES names in total, and the number of further ones of each kind."""
        mismatched = [f"{name} ({list(file)} instead of {list(model)})" for name, file, model in self.mismatched]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": mismatched}
        kinds = {kind: names for kind, names in kinds.items() if names}
        limit = MAX_NAMES // len(kinds)
        return "; ".join(f"{kind}: {first_names(names, limit)}" for kind, names in kinds.items())


def diagnose(differences: Differences, model: PreTrainedModel) -> str:
    """The likely cause of such differences and its fix, in one sentence."""
    return (
        _wrong_kind_of_save(differences, model)
        or _wrong_layer_count(differences, model)
        or _wrong_shapes(differences, model)
        or _missing_head(differences, model)
        or "Use a config.json and weights of the same model."
    )


def _wrong_kind_of_save(differences: Differences, model: PreTrainedModel) -> str:
    """The sentence if the names show how the model was saved; else ''."""
    unexpected = differences.unexpected
    for mark, sentence in _WRAPPER_MARKS.items():
        if any(mark in name for name in unexpected):
            return sentence
    if any(_QUANTIZED.search(name) for name in unexpected):
        return "This looks like a quantised checkpoint; use it in bfloat16, float16 or float32."
    if any(_MULTIMODAL.search(name) for name in unexpected):
        return (
            "This looks like a multimodal model with the config.json of its language model; use the config.json of the "
            "whole model, or the weights of the language model only."
        )
    prefix = _common_prefix(differences, model.base_model_prefix)
    if prefix == "module.":
        return "This looks like a model saved inside DistributedDataParallel; save its .module instead."
    if prefix:
        return f"This looks like a model inside another one; remove the prefix {prefix!r} from the tensors' names."
    return ""


def _common_prefix(differences: Differences, base_prefix: str) -> str:
    """A prefix that at least half of the unexpected names have and the missing ones lack; '' if there is none."""
    missing = {*differences.missing, *(name.removeprefix(f"{base_prefix}.") for name in differences.missing)}
    for name in differences.unexpected:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in missing:
                prefix = ".".join(parts[:cut]) + "."
                prefixed = [other for other in differences.unexpected if other.startswith(prefix)]
                if 2 * len(prefixed) >= len(differences.unexpected):
                    return prefix
    return ""


def _wrong_layer_count(differences: Differences, model: PreTrainedModel) -> str:
    """The sentence if only whole layers are missing or surplus; else ''."""
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    key = config.attribute_map.get("num_hidden_layers") or "num_hidden_layers"
    if not isinstance(count, int) or differences.mismatched:
        return ""
    missing, surplus = _layer_numbers(differences.missing), _layer_numbers(differences.unexpected)

    only_surplus = not differences.missing and all(map(_LAYER_NUMBER.search, differences.unexpected))
    if surplus and only_surplus and min(surplus) >= count:
        return f"The files hold {max(surplus) + 1} layers, but config.json says {key}: {count}; correct config.json."

    only_missing = not differences.unexpected and all(map(_LAYER_NUMBER.search, differences.missing))
    if missing and only_missing:
        of_missing_layers = [name for name in model.state_dict() if _layer_numbers([name]) & missing]
        is_whole_end = missing == set(range(min(missing), count))
        if len(of_missing_layers) == len(differences.missing) and is_whole_end:
            return (
                f"The files hold only {min(missing)} of the {count} layers that config.json states ({key}); correct "
                f"config.json or download the checkpoint again."
            )
        return f"The files lack weights of layer {min(missing)}; download the checkpoint again."
    return ""


def _layer_numbers(names: Collection[str]) -> set[int]:
    return {int(match[1]) for match in map(_LAYER_NUMBER.search, names) if match}


def _wrong_shapes(differences: Differences, model: PreTrainedModel) -> str:
    """The sentence if only shapes differ; else ''."""
    if not differences.mismatched or differences.missing or differences.unexpected:
        return ""
    tables = _parameter_names(model, model.get_output_embeddings())
    tables |= _parameter_names(model, model.get_input_embeddings())
    vocab_sizes = [
        (file[0], expected[0])
        for name, file, expected in differences.mismatched
        if name in tables and file[1:] == expected[1:] != ()
    ]
    if vocab_sizes and len(vocab_sizes) == len(differences.mismatched):
        in_files, in_config = vocab_sizes[0]
        return (
            f"The files have a vocabulary of {in_files} entries, but config.json says vocab_size: {in_config}; use the "
            f"config.json that belongs to the weights."
        )
    return "The sizes in config.json are those of another model; use the config.json that belongs to the weights."


def _missing_head(differences: Differences, model: PreTrainedModel) -> str:
    """The sentence if only the output embedding is missing; else ''."""
    head = _parameter_names(model, model.get_output_embeddings())
    if not differences.missing or differences.unexpected or not set(differences.missing) <= head:
        return ""
    return (
        "This looks like a base model without its head; use the causal language model, or, if the head is tied to the "
        "embedding, set tie_word_embeddings to true in config.json."
    )


def _parameter_names(model: PreTrainedModel, module: torch.nn.Module | None) -> set[str]:
    """The names in `model` of the parameters that `module` holds directly."""
    if module is None:
        return set()
    paths = [path for path, submodule in model.named_modules() if submodule is module]
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return {f"{path}.{name}" for path in paths for name in names}
