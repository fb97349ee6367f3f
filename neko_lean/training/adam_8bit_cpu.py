"""bitsandbytes' blockwise 8-bit Adam on a CPU, from PyTorch's own operators.

bitsandbytes' CPU kernel quantizes one element at a time, which takes most of the time of its update. Here every step is
one vectorized operator. Weights, codes and scales are the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neko_lean.training.adam_state import BLOCK, AdamSettings, AdamState, AdamUpdate

CPU_SLICE = 2**20  # elements whose moments are in float32 at a time: few enough for the cache, a multiple of BLOCK
TABLE_SIZE = 65536  # values in [-1, 1] for which a code is tabulated, as in bitsandbytes' CPU kernel


@dataclass(frozen=True)
class Codebook:
    """How a value in [-1, 1] becomes an 8-bit code, and back."""

    values: Tensor  # [256] float32, sorted
    codes: Tensor  # [TABLE_SIZE] uint8, the code of each of TABLE_SIZE values evenly spaced from -1 to 1

    @classmethod
    def of(cls, values: Tensor) -> Codebook:
        """The codebook with these values [256]; each tabulated value gets the code whose value is nearest."""
        tabulated = -1.0 + 2.0 * torch.arange(TABLE_SIZE, dtype=torch.float32) / (TABLE_SIZE - 1)
        midpoints = 0.5 * (values[:-1] + values[1:])
        return cls(values, torch.bucketize(tabulated, midpoints).to(torch.uint8))


def blockwise_update_on_cpu(settings: AdamSettings, signed: Tensor, unsigned: Tensor) -> AdamUpdate:
    """The update of parameters with quantized state.

    Args:
        settings: hyperparameters.
        signed, unsigned: values [256] of the codes of the first and of the second moment.
    """
    first_book, second_book = Codebook.of(signed), Codebook.of(unsigned)

    def update_slice(state: AdamState, grad: Tensor, weight: Tensor, step: int, lr: float) -> None:
        assert state.scale1 is not None and state.scale2 is not None
        first = dequantize(state.first, state.scale1, first_book)
        second = dequantize(state.second, state.scale2, second_book)
        adam_step_(weight, grad, first, second, settings, step, lr)
        quantize_(first, state.first, state.scale1, first_book)
        quantize_(second, state.second, state.scale2, second_book)

    def update(state: AdamState, grad: Tensor, weight: Tensor, step: int, lr: float) -> None:
        for start in range(0, len(weight), CPU_SLICE):
            part = slice(start, min(len(weight), start + CPU_SLICE))
            update_slice(state.part(part, bits=8), grad[part], weight[part], step, lr)

    return update


def dequantize(codes: Tensor, scale: Tensor, book: Codebook) -> Tensor:
    """Values [n] float32 of codes [n] uint8 with one scale per block."""
    values = book.values.index_select(0, codes.to(torch.int32))
    for block, block_scale in _blocks(values, scale):
        block.mul_(block_scale[:, None])
    return values


def quantize_(values: Tensor, codes: Tensor, scale: Tensor, book: Codebook) -> None:
    """Store values [n] float32 as codes [n] uint8 with one scale per block. Overwrites `values`."""
    for block, block_scale in _blocks(values, scale):
        torch.maximum(block.amax(1), -block.amin(1), out=block_scale)
        block.mul_((1.0 / block_scale)[:, None])

    # A block of zeros has become NaN; its codes do not matter, and bitsandbytes stores 0.
    values.nan_to_num_(nan=-1.0, posinf=1.0, neginf=-1.0).add_(1.0)
    torch.add(torch.tensor(0.5), values, alpha=(TABLE_SIZE - 1) / 2, out=values)
    torch.index_select(book.codes, 0, values.to(torch.int32), out=codes)


def adam_step_(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, settings: AdamSettings, step: int, lr: float
) -> None:
    """One step in place, on float32 tensors [n]; `first` and `second` are the moments."""
    beta1, beta2 = settings.betas
    first.mul_(beta1).add_(grad, alpha=1.0 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)

    correction1, correction2 = 1.0 - beta1**step, math.sqrt(1.0 - beta2**step)
    if settings.weight_decay > 0.0:
        weight.mul_(1.0 - lr * settings.weight_decay)
    weight.addcdiv_(first, second.sqrt().div_(correction2).add_(settings.eps), value=-lr / correction1)


def _blocks(values: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the full blocks [n // BLOCK, BLOCK] and of the last, shorter one [1, n % BLOCK], with their scales."""
    full = len(values) // BLOCK
    yield values[: full * BLOCK].view(full, BLOCK), scale[:full]
    if len(values) % BLOCK:
        yield values[full * BLOCK :][None], scale[full:]
