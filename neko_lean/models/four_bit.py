"""Dequantise bitsandbytes' 4-bit codes, NF4 or FP4 (QLoRA, arXiv 2305.14314), on any CPU.

bitsandbytes 0.50.2's kernel for CPUs with AVX-512 restarts the scales at every row, although a scale belongs to a block
of the flattened weight, so it returns wrong weights where a row is not a whole number of blocks. Here it only ever sees
rows that are one block.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


def dequantize_4bit(codes: Tensor, state: QuantState) -> Tensor:
    """The weight that `bitsandbytes.functional.quantize_4bit` made `codes` and `state` of.

    Args:
        codes: two 4-bit codes per byte, of any shape and dtype.
        state: the scales, and the shape and dtype of the weight.

    Returns:
        The weight, of `state.shape` and `state.dtype`.
    """
    from bitsandbytes import functional as bnb

    size = math.prod(state.shape)
    blocks = math.ceil(size / state.blocksize)
    by_block = copy.copy(state)
    by_block.shape = torch.Size((blocks, state.blocksize))
    codes = codes.contiguous().view(torch.uint8).flatten()
    codes = nn.functional.pad(codes, (0, blocks * state.blocksize // 2 - len(codes)))  # a last block that is not full
    weight = bnb.dequantize_4bit(codes[:, None], by_block)  # [blocks, blocksize]
    return weight.flatten()[:size].view(state.shape)
