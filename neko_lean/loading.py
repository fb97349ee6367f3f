"""Whether the weights that were loaded are the checkpoint's: every tensor is there, has its shape, and is finite.

transformers fills a tensor that it does not find with random numbers, and leaves out one that it does not know. Here
both are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from neko_lean.errors import NekoLeanError
from neko_lean.progress import say
from neko_lean.quantized import refuse_gguf
from neko_lean.trust import is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILES = (
    "*.safetensors", "*.safetensors.*", "*.gguf", "*.gguf.*", "pytorch_model*", "tf_model*", "flax_model*",
    "consolidated*", "*.bin", "*.bin.index.json", "*.ckpt*", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.npz",
    "*.distcp",
)  # fmt: skip
MAX_KEYS = 5  # tensor names in an error message
# Dtypes that hold weights as they are, as safetensors calls them; all others need scales or a table to be read.
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_NUMBERED = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.")
_QUANTIZED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|SCB|weight_format|qweight|qzeros|g_idx|scales|zeros|weight_packed|weight_scale"
    r"|weight_scale_inv|weight_zero_point|W_q|meta|input_scale|qdata)$|quant_state|_blocks$|_scales$"
)
# Buffers that older versions of transformers saved and newer ones compute: masks, rotary frequencies and positions.
_OLD_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|causal_mask|inv_freq|cos_cached|sin_cached|position_ids|embed_positions\.(weights|_float_tensor))$"
)
_MULTIMODAL = re.compile(r"vision|visual|audio|multi_modal|mm_projector|image|speech")


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors file says of one of its tensors."""

    file: Path
    dtype: str  # as safetensors calls it: F32, BF16, U8, ...
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Differences:
    """How a checkpoint's tensors differ from the model that its config.json describes, all names sorted."""

    missing: Sequence[str]  # the model has them, the files do not
    unexpected: Sequence[str]  # the files have them, the model does not
    mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape in the files, shape in the model

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights in any format, read here or not; with some, no model starts at random."""
    # By name: a link whose file is gone (a download that was cut off) counts too, and so do checkpoint-500/, original/.
    names = [path.name.lower() for path in (*folder.iterdir(), *folder.glob("*/*"))]
    return any(fnmatch(name, pattern) for name in names for pattern in _WEIGHT_FILES)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; NekoLeanError when there are none or one is missing."""
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():  # transformers, too, prefers the single file
        names = sorted(set(_weight_map(folder).values()))
    else:
        names = [WEIGHTS]
    files = [folder / name for name in names]
    for file in files:
        if file.is_file():
            continue
        refuse_gguf(folder)
        raise NekoLeanError(f"{folder} lacks {file.name}: neko-lean reads weights from safetensors only.")
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    """The index of a checkpoint in several files: the file of each tensor, by name."""
    index = folder / INDEX
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(found.values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise NekoLeanError(f"{index} is not a readable index of weights.") from error
    strange = next((name for name in names if not is_plain(name)), None)
    if strange is not None:
        raise NekoLeanError(f"{index} names {strange!r}, which is no file of its folder: get the checkpoint again.")
    return dict(found)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What the files of a checkpoint hold, by name; only their headers are read.

    Raises NekoLeanError when a file cannot be read, when the index disagrees with the files, or when two files hold
    different tensors of one name.
    """
    found: dict[str, StoredTensor] = {}
    files = weight_files(folder)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                held = {n: StoredTensor(file, str(p.get_dtype()), tuple(p.get_shape())) for n, p in parts.items()}
        except Exception as error:
            raise NekoLeanError(f"{file} is not a readable safetensors file ({error}).") from error
        for name in sorted(held.keys() & found.keys()):
            if not torch.equal(_bytes(file, name), _bytes(found[name].file, name)):
                raise NekoLeanError(
                    f"{file.name} and {found[name].file.name} in {folder} both hold {name}, with different values: "
                    f"get the checkpoint again."
                )
        found |= held
    if (folder / INDEX).is_file() and files[0].name != WEIGHTS:
        _check_index(folder, found)
    # transformers rebuilds a model from such shards instead of from the weights that are checked here.
    if any(folder.glob("shard-*-model-*-of-*.safetensors")):
        raise NekoLeanError(f"{folder} holds a distributed checkpoint: save it with save_pretrained, as one model.")
    return found


def _bytes(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor.contiguous().view(-1).view(torch.uint8)


def _check_index(folder: Path, found: Mapping[str, StoredTensor]) -> None:
    """Raise NekoLeanError unless the index names exactly the tensors that its files hold."""
    listed = _weight_map(folder)
    if "metadata" not in json.loads((folder / INDEX).read_text(encoding="utf-8")):
        raise NekoLeanError(f'{folder / INDEX} has no metadata, which transformers needs: add "metadata": {{}} to it.')
    lost = sorted(name for name in listed if name not in found)
    if lost:
        raise NekoLeanError(
            f"{folder / INDEX} lists {_some(lost)}, which {listed[lost[0]]} does not hold: get the checkpoint again."
        )
    extra = sorted(name for name in found if name not in listed)
    if extra:
        raise NekoLeanError(
            f"{found[extra[0]].file} holds {_some(extra)}, which {INDEX} does not list: it is of another save, so get "
            f"the checkpoint again."
        )


def refuse_packed(stored: Mapping[str, StoredTensor]) -> None:
    """Raise NekoLeanError when a weight is stored quantised though config.json says nothing of it.

    Integers are fine in buffers, such as masks and positions, which have no `weight` in their name.
    """
    for name, tensor in sorted(stored.items()):
        if tensor.dtype not in PLAIN_DTYPES and (tensor.dtype.startswith("F") or "weight" in name.rsplit(".", 1)[-1]):
            raise NekoLeanError(
                f"{tensor.file} holds {name} as {tensor.dtype}, so it is quantised, and config.json does not say how: "
                f"give the checkpoint in bfloat16, float16 or float32."
            )


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


def _listed(found: Differences) -> str:
    """At most MAX_KEYS names, and how many there are of each kind."""
    groups = {
        "missing": list(found.missing),
        "unexpected": list(found.unexpected),
        "of another shape": [
            f"{name} ({list(there)} instead of {list(here)})" for name, there, here in found.mismatched
        ],
    }
    groups = {kind: names for kind, names in groups.items() if names}
    each = MAX_KEYS // len(groups)
    return "; ".join(f"{kind}: {_some(names, each)}" for kind, names in groups.items())


def _some(names: Sequence[str], most: int = MAX_KEYS) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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


def _names_of(model: PreTrainedModel, module: torch.nn.Module | None) -> set[str]:
    """Names of a module's own tensors in the model."""
    paths = [path for path, one in model.named_modules() if one is module]
    own = [] if module is None else [name for name, _ in module.named_parameters(recurse=False)]
    return {f"{path}.{name}" for path in paths for name in own}


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
        say(
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
    say(
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
