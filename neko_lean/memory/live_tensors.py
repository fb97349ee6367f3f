"""Count the bytes of live tensors while code runs, also on fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from neko_lean.memory.estimate import ACTIVATIONS
from neko_lean.memory.fake_tensors import tensors_in

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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper that skips it slows every operator

    @property
    def resident(self) -> int:
        """Peak of the resident set of a process on a CPU, as far as these tensors cause it.

        The heap does not shrink during a step, so its peak and the peak of the mapped blocks add up, whenever each of
        them occurred. Scratch memory of kernels, which no tensor shows, is included.
        """
        now, peak = [0, 0], [0, 0]  # of the heap and of mapped blocks
        for block, sign in self.events:
            mapped = block.bytes >= MMAP_THRESHOLD
            now[mapped] += sign * block.bytes
            if now[mapped] > peak[mapped]:
                peak[mapped] = now[mapped]
        return sum(peak)

    def peak_by_kind(self, leave_out: Collection[str] = ()) -> dict[str, int]:
        """Bytes by kind at the moment of the peak; they add up to it.

        Args:
            leave_out: kinds that do not count, so that the peak may be that of another moment.
        """
        counted = [
            (block, sign) for block, sign in self.events if block.kind != SCRATCH and block.kind not in leave_out
        ]
        totals = list(accumulate(sign * block.bytes for block, sign in counted))
        peak = max(totals, default=0)
        if peak <= 0:
            return {}
        now: Counter[str] = Counter()
        for block, sign in counted[: totals.index(peak) + 1]:
            now[block.kind] += sign * block.bytes
        return {kind: count for kind, count in now.items() if count}

    def scratch(self, count: int) -> None:
        """Count `count` bytes that a CPU kernel allocates and frees while everything else is alive."""
        if count:
            block = Block(count, SCRATCH)
            self.events += [(block, 1), (block, -1)]

    def temporary(self, count: int, kind: str) -> None:
        """Count `count` bytes of a kind that are allocated and freed while everything else is alive."""
        block = Block(count, kind)
        self.allocate(block)
        self.free(block)

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
        if self.now > self.peak:
            self.peak = self.now
        if block.bytes > self.largest:
            self.largest = block.bytes

    def free(self, block: Block) -> None:
        """Stop to count a block."""
        if not block.freed:
            block.freed = True
            self.events.append((block, -1))
            self.now -= block.bytes

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # autograd asks for it several times for each operator
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        for tensor in tensors_in([out]):
            address = _address(tensor)
            if address not in self._alive and all(address != _address(given) for given in _given(args, kwargs)):
                self._add(tensor)
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


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments."""
    yield from tensors_in(args)
    yield from tensors_in(kwargs.values())


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
