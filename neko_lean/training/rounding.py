"""Stochastic rounding from float32 to bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round up or down, with the probabilities for which the expected result equals the value.

    Near 0.02 two neighbouring bfloat16 numbers are 1.2e-4 apart, more than an Adam update at lr 5e-5 moves a weight.
    Rounding to nearest would therefore leave the weight unchanged. Stochastic rounding keeps the update in expectation,
    by adding 16 random bits below the bits that bfloat16 keeps, and then truncating.

    Args:
        value: float32 [n].
        generator: source of the random bits, on the same device.

    Returns bfloat16 [n]. Infinities and NaN are kept.

    Example:
        >>> import torch
        >>> value = torch.full((100_000,), 1.001)
        >>> rounded = round_stochastically(value, torch.Generator().manual_seed(0))
        >>> rounded.unique().tolist()
        [1.0, 1.0078125]
        >>> round(rounded.double().mean().item(), 4)
        1.001
    """
    count = value.numel()
    noise = torch.empty(-(-count // 4), dtype=torch.int64, device=value.device)
    noise.random_(-(2**63), None, generator=generator)  # each int64 holds four 16-bit draws
    low = noise.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)  # [n]
    # The carry out of the low half is the rounding. Infinities and the canonical NaN do not change.
    high = (value.view(torch.int32) + low).view(torch.int16)[1::2]  # [n]
    return high.view(torch.bfloat16)
