"""The head of `models/chunked_head.py` with other kernels for its passes over a chunk of logits.

A candidate: it moves into the package only if bench/gpu.py measures that it is faster on a GPU. The matrix products
stay torch's. Per chunk of logits z [c, V], the forward pass reads z once for the logsumexp outside the top k, to which
the top k are added; the backward pass reads z once and writes the gradient in the weights' dtype. torch's own operators
make several passes each.

Needs the triton package for `TRITON` only; TRITON_INTERPRET=1 runs its kernels on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neko_lean.models.chunked_head import _bucket_kl
from neko_lean.models.lm_head import logits, rows_per_chunk

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LSE_BLOCK, GRAD_BLOCK = 4096, 2048  # columns that one program handles at a time


class Kernels(NamedTuple):
    """The two passes over a chunk of logits."""

    row_lse: Callable[[Tensor], Tensor]
    """logsumexp [c] of each row of z [c, V] float32."""

    grad_logits: Callable[..., Tensor]
    """`grad_logits(z, lse, lse_tail, a, b, target, g, dtype)` with z [c, V] and [c] float32 (target int64).

    Returns a * exp(z - lse) - b * exp(z - lse_tail), plus g at the target (-1: none), as [c, V] of `dtype`; entries of
    z that are -inf give 0."""


def torch_row_lse(z: Tensor) -> Tensor:
    return z.logsumexp(1)


def torch_grad_logits(
    z: Tensor, lse: Tensor, lse_tail: Tensor, a: Tensor, b: Tensor, target: Tensor, g: Tensor, dtype: torch.dtype
) -> Tensor:
    tail = torch.where(z == -torch.inf, 0, b[:, None] * (z - lse_tail[:, None]).exp())
    column = torch.arange(z.shape[1], device=z.device)
    at_target = torch.where(column == target[:, None], g[:, None], 0)
    return (a[:, None] * (z - lse[:, None]).exp() - tail + at_target).to(dtype)


TORCH = Kernels(torch_row_lse, torch_grad_logits)


def compiled() -> Kernels:
    """Torch's operators, fused by torch.compile."""
    return Kernels(*(torch.compile(function, dynamic=True) for function in TORCH))


class Teacher(NamedTuple):
    """A chunk of the teacher's distributions, as `token_stats` of the package takes them."""

    ids: Tensor  # [c, k] int64; unused entries repeat the first id of their row
    logp: Tensor  # [c, k], -inf marks an unused entry
    tail_logp: Tensor  # [c]

    def rows(self, rows: slice) -> Teacher:
        return Teacher(*(tensor[rows] for tensor in self))

    @property
    def is_counted(self) -> Tensor:
        """[c, k] bool: the used entries, and the first one, so that each id of a row is marked exactly once."""
        counted = self.logp > -torch.inf
        counted[:, :1] = True
        return counted


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    topk_ids: Tensor | None = None,
    topk_logp: Tensor | None = None,
    tail_logp: Tensor | None = None,
    *,
    kernels: Kernels = TORCH,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`neko_lean.models.token_stats` for a head without bias, scale and soft cap, with these kernels.

    Returns (target_logp [N], kl [N]) in float32.
    """
    teacher = None
    if topk_ids is not None and topk_logp is not None and tail_logp is not None:
        teacher = Teacher(torch.where(topk_logp == -torch.inf, topk_ids[:, :1], topk_ids), topk_logp, tail_logp)
    stats: tuple[Tensor, Tensor] = _TokenStats.apply(
        hidden, weight, target, teacher, kernels, chunk or rows_per_chunk(len(weight))
    )
    return stats


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, teacher: Teacher | None, kernels: Kernels, chunk: int
    ) -> tuple[Tensor, Tensor]:
        target_logp, kl, lse, lse_tail = torch.zeros(4, len(target), device=hidden.device)  # [N] each
        for start in range(0, len(target), chunk):
            rows = slice(start, start + chunk)
            z = logits(hidden[rows], weight)  # [c, V]
            target_z = z.gather(1, target[rows, None].clamp(min=0)).squeeze(1)  # [c]

            if teacher is None:
                lse[rows] = kernels.row_lse(z)
            else:
                part = teacher.rows(rows)
                topk_z = z.gather(1, part.ids)  # [c, k]
                lse_tail[rows] = kernels.row_lse(z.scatter_(1, part.ids, -torch.inf))
                topk_lse = topk_z.masked_fill(~part.is_counted, -torch.inf).logsumexp(1)  # [c]
                lse[rows] = torch.logaddexp(lse_tail[rows], topk_lse)
                kl[rows] = _bucket_kl(part.logp, part.tail_logp, topk_z, lse[rows], lse_tail[rows])

            target_logp[rows] = torch.where(target[rows] >= 0, target_z - lse[rows], 0)
            del z  # free this chunk's logits before the next chunk's are allocated
        ctx.save_for_backward(hidden, weight, target, lse, lse_tail, *(teacher or ()))
        ctx.kernels, ctx.chunk = kernels, chunk
        return target_logp, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_target: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, lse, lse_tail, *topk = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        grad_target = torch.where(target >= 0, grad_target, 0)

        for start in range(0, len(target), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            z = logits(hidden[rows], weight)  # [c, V]
            part = Teacher(*topk).rows(rows) if topk else None
            rest = (tensor[rows] for tensor in (target, lse, lse_tail, grad_target, grad_kl))
            dz = _grad_logits(ctx.kernels, z, part, *rest, hidden.dtype)
            torch.mm(dz, weight, out=grad_hidden[rows])
            grad_weight.addmm_(dz.T, hidden[rows])
            del z, dz
        return grad_hidden, grad_weight, None, None, None, None


def _grad_logits(
    kernels: Kernels,
    z: Tensor,
    teacher: Teacher | None,
    target: Tensor,
    lse: Tensor,
    lse_tail: Tensor,
    g_target: Tensor,
    g_kl: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient with respect to the logits z [c, V], which are changed; the other tensors are [c]."""
    if teacher is None:
        return kernels.grad_logits(z, lse, lse, -g_target, torch.zeros_like(lse), target, g_target, dtype)
    p, t = teacher.logp.exp(), teacher.tail_logp.exp()  # [c, k], [c]
    a, b = (p.sum(1) + t) * g_kl - g_target, t * g_kl
    lse_tail = torch.where(teacher.tail_logp > -torch.inf, lse_tail, torch.inf)  # an empty tail contributes nothing

    # The top k are left to the second step: in the weights' dtype, a sum with the rest would be rounded twice.
    topk_z = z.gather(1, teacher.ids)  # [c, k]
    z.scatter_(1, teacher.ids, -torch.inf)
    at_target = (teacher.ids == target[:, None]) & teacher.is_counted
    outside = torch.where(at_target.any(1), -1, target)
    dz = kernels.grad_logits(z, lse, lse_tail, a, b, outside, g_target, dtype)

    topk_dz = a[:, None] * (topk_z - lse[:, None]).exp() - p * g_kl[:, None]
    topk_dz = (topk_dz + at_target * g_target[:, None]).masked_fill(~teacher.is_counted, 0)
    return dz.scatter_add_(1, teacher.ids, topk_dz.to(dtype))


if triton is not None:

    @triton.jit
    def _row_lse_kernel(z_ptr, out_ptr, columns, BLOCK: tl.constexpr):
        """One program per row: running maximum and sum of exponentials of each lane, then over the lanes."""
        row = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + lanes
            z = tl.load(z_ptr + row * columns + column, mask=column < columns, other=float("-inf"))
            new = tl.maximum(largest, z)
            finite = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
            total = total * tl.exp(largest - finite) + tl.exp(z - finite)
            largest = new
        top = tl.max(largest, axis=0)
        top = tl.where(top == float("-inf"), 0.0, top)
        tl.store(out_ptr + row, tl.log(tl.sum(total * tl.exp(largest - top), axis=0)) + top)

    @triton.jit
    def _grad_logits_kernel(
        z_ptr, dz_ptr, lse_ptr, tail_ptr, a_ptr, b_ptr, target_ptr, g_ptr, columns, BLOCK: tl.constexpr
    ):
        """One program per row and block of columns."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(z_ptr + row * columns + column, mask=inside, other=float("-inf"))
        dz = tl.load(a_ptr + row) * tl.exp(z - tl.load(lse_ptr + row))
        dz -= tl.load(b_ptr + row) * tl.exp(z - tl.load(tail_ptr + row))
        dz = tl.where(z == float("-inf"), 0.0, dz)
        dz += tl.where(column == tl.load(target_ptr + row), tl.load(g_ptr + row), 0.0)
        tl.store(dz_ptr + row * columns + column, dz.to(dz_ptr.dtype.element_ty), mask=inside)

    def triton_row_lse(z: Tensor) -> Tensor:
        out = torch.empty(len(z), device=z.device)
        _row_lse_kernel[(len(z),)](z, out, z.shape[1], BLOCK=LSE_BLOCK, num_warps=8)
        return out

    def triton_grad_logits(
        z: Tensor, lse: Tensor, lse_tail: Tensor, a: Tensor, b: Tensor, target: Tensor, g: Tensor, dtype: torch.dtype
    ) -> Tensor:
        dz = torch.empty(z.shape, dtype=dtype, device=z.device)
        grid = (len(z), triton.cdiv(z.shape[1], GRAD_BLOCK))
        per_row = (tensor.contiguous() for tensor in (lse, lse_tail, a, b, target, g))
        _grad_logits_kernel[grid](z, dz, *per_row, z.shape[1], BLOCK=GRAD_BLOCK, num_warps=4)
        return dz

    TRITON: Kernels | None = Kernels(triton_row_lse, triton_grad_logits)
else:
    TRITON = None
