"""Adam's settings and its state of one parameter, quantized in blocks, and the state's transfer to a GPU and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

BLOCK = 256  # elements that share a quantisation scale in bitsandbytes' blockwise Adam
BLOCK_4BIT = 128  # the same in torchao's 4-bit state (arXiv 2309.01507), which packs two elements into a byte
MIN_8BIT = 4096  # smaller tensors keep float32 state, as in bitsandbytes


@dataclass
class AdamState:
    """Adam's two moments: quantised codes with one scale per block, or float32 values if the scales are None."""

    first: Tensor  # [numel] uint8 or float32; [numel / 2] uint8 at 4 bits
    second: Tensor  # like first
    scale1: Tensor | None = None  # [ceil(numel / block)] float32
    scale2: Tensor | None = None  # like scale1

    def part(self, elements: slice, bits: int) -> AdamState:
        """Views of some elements, of which the first is the first of a block."""
        if self.scale1 is None or self.scale2 is None:
            return AdamState(self.first[elements], self.second[elements])
        block, per_byte = (BLOCK, 1) if bits == 8 else (BLOCK_4BIT, 2)
        codes = slice(elements.start // per_byte, elements.stop // per_byte)
        blocks = slice(elements.start // block, -(-elements.stop // block))
        return AdamState(self.first[codes], self.second[codes], self.scale1[blocks], self.scale2[blocks])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True)
class AdamSettings:
    """Hyperparameters of Adam; the weight decay is decoupled."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


AdamUpdate = Callable[[AdamState, Tensor, Tensor, int, float], None]
"""`update(state, grad, weight, step, lr)` changes state and weight in place; grad and weight are float32 [n]."""


def new_state(numel: int, full_numel: int, bits: int, device: torch.device, pin: bool = False) -> AdamState:
    """The zero state of a parameter.

    Args:
        numel: elements of this rank's part of the parameter.
        full_numel: elements of the whole parameter.
        bits: bits per value, 8 or 4.
        device: where the state is stored.
        pin: whether to pin its memory.
    """

    def zeros(count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device, pin_memory=pin)

    if full_numel < MIN_8BIT or (bits == 4 and numel % BLOCK_4BIT):
        return AdamState(zeros(numel, torch.float32), zeros(numel, torch.float32))
    codes, blocks = (numel, -(-numel // BLOCK)) if bits == 8 else (numel // 2, numel // BLOCK_4BIT)
    return AdamState(
        zeros(codes, torch.uint8), zeros(codes, torch.uint8), zeros(blocks, torch.float32), zeros(blocks, torch.float32)
    )


def state_size(numel: int, bits: int = 8) -> int:
    """Bytes of Adam's state of a parameter with `numel` elements."""
    if numel < MIN_8BIT:
        return 8 * numel
    if bits == 8:
        return 2 * numel + 8 * -(-numel // BLOCK)
    return numel + 8 * (numel // BLOCK_4BIT) if numel % BLOCK_4BIT == 0 else 8 * numel


def fetch_parts(
    state: AdamState, parts: Sequence[slice], bits: int, device: torch.device, copies: torch.cuda.Stream
) -> Iterator[tuple[slice, AdamState]]:
    """Yield each part of a state in host memory as a copy on a GPU, and store what the caller changes in it.

    A part is fetched while the one before it is in use, and stored while the one after it is in use. Both directions
    run on the stream `copies`, so a part is never fetched before it was stored.
    """
    if not parts:
        return
    compute = torch.cuda.current_stream(device)
    fetched = _fetch(state.part(parts[0], bits), device, copies)
    for number, part in enumerate(parts):
        current = fetched
        compute.wait_stream(copies)
        if number + 1 < len(parts):
            fetched = _fetch(state.part(parts[number + 1], bits), device, copies)

        yield part, current

        copies.wait_stream(compute)
        with torch.cuda.stream(copies):
            for name, host_tensor in state.part(part, bits).tensors().items():
                device_tensor = getattr(current, name)
                host_tensor.copy_(device_tensor, non_blocking=True)
                device_tensor.record_stream(copies)


def _fetch(host: AdamState, device: torch.device, copies: torch.cuda.Stream) -> AdamState:
    """Start to copy a state to the GPU."""
    with torch.cuda.stream(copies):
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in host.tensors().items()}
    for tensor in tensors.values():  # created on one stream and used on another
        tensor.record_stream(torch.cuda.current_stream(device))
    return AdamState(**tensors)
