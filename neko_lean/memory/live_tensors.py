"""Count the bytes of live tensors while code runs, also on fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neko_lean.memory.estimate import ACTIVATIONS

# glibc maps blocks of at least this size one by one and returns each to the system when it is freed. Smaller blocks
# come from its heap, which stays resident (DEFAULT_MMAP_THRESHOLD_MAX in malloc.c on 64-bit systems).
MMAP_THRESHOLD = 2**25

# Kind of what a kernel allocates and no tensor shows.
SCRATCH = "scratch memory of CPU kernels"

_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@dataclass(eq=False)
class Block:
    """A storage, or scratch memory of a kernel."""

    bytes: int
    kind: str
    freed: bool = False


Event = tuple[Block, int]
"""A block and +1 when it is allocated, or -1 when it is freed."""


class LiveTensors(TorchDispatchMode):
    """Count the storages that operators create within `with LiveTensors() as live:`, until each is freed.

    Attributes:
        now: bytes alive.
        peak: largest value of `now`.
        largest: bytes of the largest storage.
        events: what was allocated and freed, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.largest = 0
        self.events: list[Event] = []
        self._alive: dict[int, Block] = {}  # by the storage's address
        self._kind = ACTIVATIONS
        self._suspended: list[list[Event]] = []  # events from outside of the recordings that are active
        self._freed_while_recording: list[Block] = []

    @property
    def resident(self) -> int:
        """Peak of the resident set of a process on a CPU, as far as these tensors cause it.

        The heap does not shrink during a step, so its peak and the peak of the mapped blocks add up, whenever each of
        them occurred. Scratch memory of kernels, which no tensor shows, is included.
        """
        now, peak = {True: 0, False: 0}, {True: 0, False: 0}  # by whether the blocks are mapped
        for block, sign in self.events:
            mapped = block.bytes >= MMAP_THRESHOLD
            now[mapped] += sign * block.bytes
            peak[mapped] = max(peak[mapped], now[mapped])
        return sum(peak.values())

    def peak_by_kind(self, leave_out: Collection[str] = ()) -> dict[str, int]:
        """Bytes by kind at the moment of the peak; they add up to it.

        Args:
            leave_out: kinds that do not count, so that the peak may be that of another moment.
        """
        now: Counter[str] = Counter()
        total = peak = 0
        at_peak: dict[str, int] = {}
        for block, sign in self.events:
            if block.kind == SCRATCH or block.kind in leave_out:
                continue
            total += sign * block.bytes
            now[block.kind] += sign * block.bytes
            if total > peak:
                peak, at_peak = total, dict(now)
        return {kind: count for kind, count in at_peak.items() if count}

    def scratch(self, count: int) -> None:
        """Count `count` bytes that a CPU kernel allocates and frees while everything else is alive."""
        if count:
            block = Block(count, SCRATCH)
            self.events += [(block, 1), (block, -1)]

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """Within this context, new storages are of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Declare the kind of the storages of some tensors. `None` is skipped."""
        for tensor in tensors:
            block = None if tensor is None else self.block(tensor)
            if block is not None:
                block.kind = kind

    def block(self, tensor: Tensor) -> Block | None:
        """The block of a tensor's storage, if it is counted here."""
        return self._alive.get(_address(tensor))

    @contextmanager
    def recording(self) -> Iterator[list[Event]]:
        """Within this context, events are recorded in the list that is yielded, and are not counted."""
        outside = self.events, self._alive, self.now, self.peak, self.largest, self._kind
        self._suspended.append(self.events)
        self.events, self._alive, self._kind = [], {}, ACTIVATIONS
        try:
            yield self.events
        finally:
            self.events, self._alive, self.now, self.peak, self.largest, self._kind = outside
            self._suspended.pop()
            while self._freed_while_recording and not self._suspended:
                self.free(self._freed_while_recording.pop())

    def allocate(self, block: Block) -> None:
        """Count a block."""
        self.events.append((block, 1))
        self.now += block.bytes
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, block.bytes)

    def free(self, block: Block) -> None:
        """Stop to count a block."""
        if not block.freed:
            block.freed = True
            self.events.append((block, -1))
            self.now -= block.bytes

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
        block = Block(storage.nbytes(), self._kind)
        self._alive[address] = block
        self.allocate(block)
        weakref.finalize(storage, self._remove, address, self._alive, self.events)

    def _remove(self, address: int, alive: dict[int, Block], events: list[Event]) -> None:
        block = alive.pop(address, None)
        if block is None:
            return
        if events is self.events:
            self.free(block)
        elif any(events is outside for outside in self._suspended):
            self._freed_while_recording.append(block)


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
