"""Count the bytes of live tensors while code runs, on fake tensors too."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    pass


# glibc maps blocks from this size on one by one and returns each when it is freed; smaller ones lie in its heap, which
# stays resident where blocks were freed between others (DEFAULT_MMAP_THRESHOLD_MAX of its malloc.c on 64 bits).
OWN_MAPPING = 2**25


class LiveTensors(TorchDispatchMode):
    """Within `with LiveTensors() as live:` counts the storages that operators create, until each is freed.

    `live.now` and `live.peak` are bytes, `live.largest` those of the largest storage. Works on fake tensors too.

    `live.resident` is the peak that a CPU's process would see. Its heap does not shrink while a step runs, so the most
    that lay there at any time is counted together with the most that was mapped apart, whenever that was; and kernels
    take scratch that no tensor shows.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.largest = 0
        self._alive: dict[int, int] = {}
        self._mapped = self._mapped_peak = self._heap_peak = 0

    @property
    def resident(self) -> int:
        return self._heap_peak + self._mapped_peak

    def scratch(self, count: int) -> None:
        """Count `count` bytes of scratch that a CPU kernel allocates and frees while everything else is alive."""
        mapped = count if count >= OWN_MAPPING else 0
        self._mapped_peak = max(self._mapped_peak, self._mapped + mapped)
        self._heap_peak = max(self._heap_peak, self.now - self._mapped + count - mapped)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        out = operator(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and _key(one) not in given and _key(one) not in self._alive:
                storage = one.untyped_storage()
                self._alive[_key(one)] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                self._mapped += storage.nbytes() if storage.nbytes() >= OWN_MAPPING else 0
                self.scratch(0)
                weakref.finalize(storage, self._freed, _key(one))
        if operator in _PRODUCTS:
            self.scratch(_product_scratch(args[-2], out))
        return out

    def _freed(self, key: int) -> None:
        count = self._alive.pop(key, 0)
        self.now -= count
        self._mapped -= count if count >= OWN_MAPPING else 0


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _product_scratch(left: Tensor, out: Tensor) -> int:
    """Scratch bytes that a CPU kernel allocates for out = left @ right.

    torch adds up a bfloat16 product in float32. Where the left matrix is transposed, as for every weight's gradient, it
    holds all of the result at once so.
    """
    adds_up = out.dtype == torch.bfloat16 and left.dim() == 2 and left.stride(-1) != 1
    return 4 * out.numel() if adds_up else 0


def _key(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
