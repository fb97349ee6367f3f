"""Tensors of a save, in safetensors files of bounded size; each rank writes and reads its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neko_lean.distributed import rank, world_size
from neko_lean.models import local_shard

WEIGHTS = "weights"  # stem of the files of trainable parameters

# Most bytes of tensors per file. A copy of no more than these has to leave the GPU at a time.
FILE_BYTES = 2**29


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in safetensors files, each read when it is accessed.

    Args:
        files: safetensors files.
        prefix: only tensors whose names start with it are included, under the rest of their names.
    """

    def __init__(self, files: list[Path], prefix: str) -> None:
        self._prefix = prefix
        self._file_of: dict[str, Any] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            self._file_of.update({name: file for name in file.keys() if name.startswith(prefix)})  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[self._prefix + name].get_tensor(self._prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def rank_stem(stem: str) -> str:
    """Start of the file names of this rank's tensors."""
    return stem if world_size() == 1 else f"{stem}-rank{rank():05d}"


def write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's part of `tensors` to `STEM-000.safetensors`, `STEM-001.safetensors`, ..."""
    files: list[dict[str, Tensor]] = [{}]
    room = FILE_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if files[-1] and size > room:
            files.append({})
            room = FILE_BYTES
        files[-1][name] = local_shard(tensor.detach()).contiguous()
        room -= size

    for number, content in enumerate(files):
        save_file(content, folder / f"{rank_stem(stem)}-{number:03d}.safetensors")


def stored_tensors(folder: Path, stem: str, prefix: str = "") -> StoredTensors:
    """This rank's tensors in the files of a stem, as `write_tensors` wrote them; see `StoredTensors` for `prefix`."""
    return StoredTensors(sorted(folder.glob(f"{rank_stem(stem)}-*.safetensors")), prefix)


@torch.no_grad()
def load_weights(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into the parameters of the same names."""
    for name, parameter in parameters.items():
        local_shard(parameter).copy_(stored[name])
