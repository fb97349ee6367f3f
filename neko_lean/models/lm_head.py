"""The language-model head: how a model family turns hidden states into logits.

Logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`. Most families have no bias, no scale and no
soft cap; `LogitTransform` states which of them a family has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Number of logits that exist at a time: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24

# Rows of a bfloat16 weight that are converted to float32 at a time on devices without a mixed-precision matmul. At
# d = 2048 a slice is 8 MiB and stays in the processor's cache: 166 rows at V = 50304 take 0.23 s, and 0.40 s in slices
# of 8192.
WEIGHT_SLICE = 1024


@dataclass(frozen=True)
class LogitTransform:
    """The function from z = hidden @ weight.T to logits: softcap * tanh(scale * (z + bias) / softcap).

    Phi, GPT-J and CodeGen have a bias, Cohere and Granite a scale, Gemma 2 and RecurrentGemma a soft cap
    (arXiv 2408.00118, section 2).

    Args:
        bias: [V], the bias of the head; None if it has none.
        scale: factor that multiplies z + bias.
        softcap: bound on the absolute value of the logits; None if they are not capped.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, z: Tensor) -> Tensor:
        """Turn z [c, V] into logits, in place."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def for_tokens(self, tokens: Tensor) -> LogitTransform:
        """The same transform for the weight rows `tokens` [c] int64 only."""
        return self if self.bias is None else replace(self, bias=self.bias[tokens])

    def derivative(self, logits: Tensor) -> Tensor | float:
        """d logits / d z at `logits` [c, V]; a float if it is the same for all elements."""
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


IDENTITY = LogitTransform()


def rows_per_chunk(vocab_size: int) -> int:
    """Number of rows whose logits fit in one chunk of CHUNK_ELEMENTS; at least 1."""
    return max(1, CHUNK_ELEMENTS // vocab_size)


@torch.no_grad()
def logits(hidden: Tensor, weight: Tensor, transform: LogitTransform = IDENTITY) -> Tensor:
    """Compute logits in full precision, without gradient.

    Args:
        hidden: [c, d] hidden states, bfloat16, float32 or float64.
        weight: [V, d] weight of the head, same dtype.
        transform: function from `hidden @ weight.T` to logits.

    Returns:
        [c, V] float32; float64 for float64 inputs.
    """
    return transform.apply_(_matmul_fp32(hidden, weight))


def _matmul_fp32(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [c, d] @ weight [V, d].T, accumulated and returned in float32 (float64 for float64)."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    # This device has no mixed-precision matmul. Convert the weight slice by slice, so that no full copy exists.
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)  # [c, V]
    hidden_fp32 = hidden.float()  # [c, d]
    buffer = torch.empty(min(WEIGHT_SLICE, len(weight)), weight.shape[1], dtype=torch.float32, device=hidden.device)
    for start in range(0, weight.shape[0], WEIGHT_SLICE):
        weight_slice = weight[start : start + WEIGHT_SLICE]  # [s, d]
        weight_fp32 = buffer[: len(weight_slice)].copy_(weight_slice)
        torch.mm(hidden_fp32, weight_fp32.T, out=out[:, start : start + WEIGHT_SLICE])
    return out
