"""Count the bytes of live tensors while code runs, also on fake tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# glibc maps blocks of at least this size one by one and returns each to the system when it is freed. Smaller blocks
# come from its heap, which stays resident (DEFAULT_MMAP_THRESHOLD_MAX in malloc.c on 64-bit systems).
MMAP_THRESHOLD = 2**25

_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class LiveTensors(TorchDispatchMode):
    """Count the storages that operators create within `with LiveTensors() as live:`, until each is freed.

    Attributes:
        now: bytes alive.
        peak: largest value of `now`.
        largest: bytes of the largest storage.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.largest = 0
        self._alive: dict[int, int] = {}  # bytes by the storage's address
        self._mapped = self._mapped_peak = self._heap_peak = 0

    @property
    def resident(self) -> int:
        """Peak of the resident set of a process on a CPU, as far as these tensors cause it.

        The heap does not shrink during a step, so its peak and the peak of the mapped blocks add up, whenever each of
        them occurred. Scratch memory of kernels, which no tensor shows, is included.
        """
        return self._heap_peak + self._mapped_peak

    def scratch(self, count: int) -> None:
        """Count `count` bytes that a CPU kernel allocates and frees while everything else is alive."""
        mapped = count if count >= MMAP_THRESHOLD else 0
        self._mapped_peak = max(self._mapped_peak, self._mapped + mapped)
        self._heap_peak = max(self._heap_peak, self.now - self._mapped + count - mapped)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _address(leaf) not in inputs and _address(leaf) not in self._alive:
                self._add(leaf)
        if operator in _MATMULS:
            self.scratch(_matmul_scratch(args[-2], out))
        return out

    def _add(self, tensor: Tensor) -> None:
        """Count a new storage until it is freed."""
        storage, address = tensor.untyped_storage(), _address(tensor)
        count = storage.nbytes()
        self._alive[address] = count
        self.largest = max(self.largest, count)
        self.now += count
        self.peak = max(self.peak, self.now)
        self._mapped += count if count >= MMAP_THRESHOLD else 0
        self.scratch(0)
        weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        count = self._alive.pop(address, 0)
        self.now -= count
        self._mapped -= count if count >= MMAP_THRESHOLD else 0


def _matmul_scratch(left: Tensor, out: Tensor) -> int:
    """Scratch bytes that a CPU kernel allocates for `out = left @ right`.

    PyTorch accumulates a bfloat16 product in float32. If the left matrix is transposed, as it is for every weight
    gradient, the kernel holds the whole result in float32 at once.
    """
    accumulates = out.dtype == torch.bfloat16 and left.dim() == 2 and left.stride(-1) != 1
    return 4 * out.numel() if accumulates else 0


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
