"""The weight files of a checkpoint folder: which tensors they hold, read from their headers without loading weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from neko_lean.errors import NekoLeanError
from neko_lean.models.quantized import refuse_gguf
from neko_lean.models.trust import is_plain

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Names of weight files in any format, whether neko-lean reads it or not.
_WEIGHT_FILES = (
    "*.safetensors", "*.safetensors.*", "*.gguf", "*.gguf.*", "pytorch_model*", "tf_model*", "flax_model*",
    "consolidated*", "*.bin", "*.bin.index.json", "*.ckpt*", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.npz",
    "*.distcp",
)  # fmt: skip

# Safetensors dtypes that hold the values themselves. All others need scales or a lookup table.
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

# Largest number of tensor names in an error message.
MAX_NAMES = 5


@dataclass(frozen=True)
class StoredTensor:
    """The header entry of a tensor in a safetensors file."""

    file: Path
    dtype: str  # in safetensors' spelling: F32, BF16, U8, ...
    shape: tuple[int, ...]


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights in any format. If so, no model is initialised at random from its config.json."""
    # By name, so that a broken link (from an interrupted download) counts, and so do checkpoint-500/ and original/.
    names = [path.name.lower() for path in (*folder.iterdir(), *folder.glob("*/*"))]
    return any(fnmatch(name, pattern) for name in names for pattern in _WEIGHT_FILES)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises:
        NekoLeanError: there are none, or one that the index names is missing.
    """
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():  # transformers prefers the single file too
        names = sorted(set(_weight_map(folder).values()))
    else:
        names = [WEIGHTS]
    for name in names:
        if not (folder / name).is_file():
            refuse_gguf(folder)
            raise NekoLeanError(
                f"{folder} has no file {name}; neko-lean reads weights from safetensors only, so download the "
                f"checkpoint again, or convert it by loading it in transformers and calling save_pretrained."
            )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors in the files of a checkpoint, by name; only the headers of the files are read.

    Raises:
        NekoLeanError: a file cannot be read, the index disagrees with the files, or two files hold different tensors
            under one name.
    """
    stored: dict[str, StoredTensor] = {}
    files = weight_files(folder)
    for file in files:
        tensors = _read_header(file)
        for name in sorted(tensors.keys() & stored.keys()):
            if not torch.equal(_tensor_bytes(file, name), _tensor_bytes(stored[name].file, name)):
                raise NekoLeanError(
                    f"{file.name} and {stored[name].file.name} in {folder} both hold {name}, with different values; "
                    f"download the checkpoint again."
                )
        stored |= tensors

    if (folder / INDEX).is_file() and files[0].name != WEIGHTS:
        _check_index(folder, stored)
    # transformers would load such shards instead of the weights that are checked here.
    if any(folder.glob("shard-*-model-*-of-*.safetensors")):
        raise NekoLeanError(
            f"{folder} holds a distributed checkpoint (shard-*-model-*.safetensors); save the whole model with "
            f"save_pretrained, and pass that folder."
        )
    return stored


def refuse_undeclared_quantization(stored: Mapping[str, StoredTensor]) -> None:
    """Raise NekoLeanError if a weight is stored quantised although config.json declares no quantisation.

    Integer buffers, such as masks and positions, are allowed: their names do not contain `weight`.
    """
    for name, tensor in sorted(stored.items()):
        if tensor.dtype not in PLAIN_DTYPES and (tensor.dtype.startswith("F") or "weight" in name.rsplit(".", 1)[-1]):
            raise NekoLeanError(
                f"{tensor.file} holds {name} as {tensor.dtype}, so it is quantised, but config.json has no "
                f"quantization_config; use the checkpoint in bfloat16, float16 or float32."
            )


def first_names(names: Sequence[str], limit: int = MAX_NAMES) -> str:
    """The first `limit` names, and how many more there are: 'a, b and 3 more'."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _weight_map(folder: Path) -> dict[str, str]:
    """From the index of a checkpoint in several files: the file name of each tensor, by tensor name."""
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = list(weight_map.values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise NekoLeanError(
            f"{index} is not a readable weight index, a JSON object with a weight_map; download the checkpoint again."
        ) from error
    outside = next((file for file in files if not is_plain(file)), None)
    if outside is not None:
        raise NekoLeanError(
            f"{index} names {outside!r}, which is not a file in its folder; download the checkpoint again."
        )
    return dict(weight_map)


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: StoredTensor(file, str(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
    except Exception as error:
        raise NekoLeanError(
            f"{file} is not a readable safetensors file ({error}); download the checkpoint again."
        ) from error


def _tensor_bytes(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor.contiguous().view(-1).view(torch.uint8)


def _check_index(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Raise NekoLeanError unless the index names exactly the tensors that its files hold."""
    index, weight_map = folder / INDEX, _weight_map(folder)
    if "metadata" not in json.loads(index.read_text(encoding="utf-8")):
        raise NekoLeanError(f'{index} has no metadata, which transformers requires; add "metadata": {{}} to it.')

    lost = sorted(name for name in weight_map if name not in stored)
    if lost:
        raise NekoLeanError(
            f"{index} lists {first_names(lost)}, but {weight_map[lost[0]]} does not hold it; download the checkpoint "
            f"again."
        )
    unlisted = sorted(name for name in stored if name not in weight_map)
    if unlisted:
        raise NekoLeanError(
            f"{stored[unlisted[0]].file} holds {first_names(unlisted)}, which {INDEX} does not list, so index and "
            f"file are from different saves; download the checkpoint again."
        )
