"""Count the bytes of live tensors while code runs, also on fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    copies: int = 1
    """Number of layers that hold such a block."""


Event = tuple[Block, int]
"""A block and +1 when it is allocated, or -1 when it is freed."""


class LiveTensors(TorchDispatchMode):
    """Count the storages that operators create within `with LiveTensors() as live:`, until each is freed.

    Args:
        layers: of each layer of a shortened model, how many layers it stands for, and whether the bytes that are alive
            while it runs may be the peak.

    Attributes:
        now: bytes alive.
        peak: largest value of `now`.
        largest: bytes of the largest storage.
        events: what was allocated and freed, in order.
    """

    def __init__(self, layers: Sequence[tuple[int, bool]] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers
        self._copies = 1  # of what is allocated now
        self._sections: list[tuple[int, bool]] = [(0, True)]  # first event of each, and whether its bytes may be a peak
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
        sizes, counted = self._sizes(), self._counted()
        mapped = np.array([block.bytes >= MMAP_THRESHOLD for block, _ in self.events], dtype=bool)
        return sum(
            int(max(0, np.where(mapped == which, sizes, 0).cumsum()[counted].max(initial=0))) for which in (0, 1)
        )

    def peak_by_kind(self, leave_out: Collection[str] = ()) -> dict[str, int]:
        """Bytes by kind at the moment of the peak; they add up to it.

        Args:
            leave_out: kinds that do not count, so that the peak may be that of another moment.
        """
        left_out = {SCRATCH, *leave_out}
        sizes = np.where([block.kind in left_out for block, _ in self.events], 0, self._sizes())
        totals = np.where(self._counted(), sizes.cumsum(), 0)
        if totals.max(initial=0) <= 0:
            return {}
        now: Counter[str] = Counter()
        for (block, _), size in zip(self.events[: int(totals.argmax()) + 1], sizes.tolist(), strict=False):
            now[block.kind] += size
        return {kind: count for kind, count in now.items() if count}

    @property
    def is_shortened(self) -> bool:
        """Whether layers stand for others."""
        return any(copies > 1 for copies, _ in self.layers)

    def enter_layer(self, number: int) -> None:
        """Note that what follows is part of a layer's forward or backward pass."""
        if self.layers:
            self._copies, counted = self.layers[number]
            self._sections.append((len(self.events), counted))

    def _sizes(self) -> NDArray[np.int64]:
        """Bytes that each event adds."""
        return np.array([sign * block.bytes * block.copies for block, sign in self.events], dtype=np.int64)

    def _counted(self) -> NDArray[np.bool_]:
        """Whether the bytes after each event may be the peak."""
        counted = np.ones(len(self.events), dtype=bool)
        ends = [start for start, _ in self._sections[1:]] + [len(self.events)]
        for (start, may_be_peak), end in zip(self._sections, ends, strict=True):
            counted[start:end] = may_be_peak
        return counted

    def scratch(self, count: int) -> None:
        """Count `count` bytes that a CPU kernel allocates and frees while everything else is alive."""
        if count:
            block = Block(count, SCRATCH, copies=self._copies)
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
        block.copies = self._copies
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
