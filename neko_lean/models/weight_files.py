"""The weight files of a checkpoint folder, read without loading the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from neko_lean.errors import NekoLeanError
from neko_lean.models.quantized import refuse_gguf
from neko_lean.models.trust import is_plain

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


_QUANTIZED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|SCB|weight_format|qweight|qzeros|g_idx|scales|zeros|weight_packed|weight_scale"
    r"|weight_scale_inv|weight_zero_point|W_q|meta|input_scale|qdata)$|quant_state|_blocks$|_scales$"
)


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


def _names_of(model: PreTrainedModel, module: torch.nn.Module | None) -> set[str]:
    """Names of a module's own tensors in the model."""
    paths = [path for path, one in model.named_modules() if one is module]
    own = [] if module is None else [name for name, _ in module.named_parameters(recurse=False)]
    return {f"{path}.{name}" for path in paths for name in own}
