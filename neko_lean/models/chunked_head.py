"""The numerical core of training: target log-probability and teacher KL, without materialising all logits.

Like Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989), `token_stats` multiplies by the head one chunk of
rows at a time. It keeps the logits of one chunk for the backward pass and recomputes the others there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from neko_lean.models.lm_head import IDENTITY, LogitTransform, logits, rows_per_chunk


class _TopK(NamedTuple):
    """A teacher's distribution for each token: its k most likely entries and the probability of all others."""

    ids: Tensor  # [N, k] int64
    logp: Tensor  # [N, k], -inf marks an unused entry
    tail_logp: Tensor  # [N], -inf if the tail is empty

    def select(self, rows: Tensor | slice) -> _TopK:
        return _TopK(self.ids[rows], self.logp[rows], self.tail_logp[rows])


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    topk_ids: Tensor | None = None,
    topk_logp: Tensor | None = None,
    tail_logp: Tensor | None = None,
    *,
    transform: LogitTransform = IDENTITY,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute, for each token, the log-probability of its target and the KL divergence from teacher to student.

    With z the logits, q = softmax(z), K the teacher's top k with probabilities p, and t its tail mass:

        target_logp = log q[target]
        kl = sum_K p (log p - log q) + t (log t - log(1 - sum_K q))

    log(1 - sum_K q) is computed as logsumexp(z outside K) - logsumexp(z), which stays exact as sum_K q approaches 1.
    The gradients with respect to z are

        d target_logp / dz = 1[target] - q
        d kl / dz = (sum_K p + t) q - p                       inside K
                    (sum_K p + t) q - t softmax(z outside K)  outside K

    A student equal to its teacher gets a gradient of 0. This holds because the tail is kept as one bucket: dropping or
    renormalising it biases the gradient (Sparse Logit Sampling, arXiv 2503.16870).

    Args:
        hidden: [N, d] last hidden states, bfloat16, float32 or float64.
        weight: [V, d] weight of the head, same dtype.
        target: [N] int64; -1 if a token needs no target, its target_logp is then 0.
        topk_ids: [N, k] int64, distinct where topk_logp is finite. None: no token has a teacher.
        topk_logp: [N, k] log p in nats; -inf marks an unused entry. The first entry of a row must be used, unless all
            are unused: such a row has no teacher, and its kl is 0.
        tail_logp: [N] log t in nats; -inf if the tail is empty.
        transform: function from `hidden @ weight.T` to logits; its bias receives a gradient too.
        chunk: rows per chunk. Default: as many as fit in CHUNK_ELEMENTS logits.

    Returns:
        (target_logp [N], kl [N]) in nats, float32 (float64 for float64 inputs), differentiable with respect to hidden,
        weight and bias.

    Example:
        >>> import torch
        >>> from neko_lean.models import token_stats
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)  # [N=2, d=2]
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])  # [V=3, d=2]
        >>> target = torch.tensor([0, -1])  # the second token has no target
        >>> topk_ids = torch.tensor([[0], [1]])
        >>> topk_logp = torch.tensor([[0.0], [0.5]]).log()  # the first token has no teacher
        >>> tail_logp = torch.tensor([0.0, 0.5]).log()
        >>> target_logp, kl = token_stats(hidden, weight, target, topk_ids, topk_logp, tail_logp)
        >>> [round(value, 4) for value in target_logp.tolist()]
        [-0.4076, 0.0]
        >>> [round(value, 4) for value in kl.tolist()]
        [0.0, 0.0578]
        >>> (kl.sum() - target_logp.sum()).backward()
        >>> tuple(hidden.grad.shape)
        (2, 2)
    """
    # Without a teacher: an empty top k.
    if topk_ids is None or topk_logp is None or tail_logp is None:
        topk_ids = target.new_zeros((len(target), 0))
        topk_logp = torch.zeros(topk_ids.shape, dtype=torch.float32, device=hidden.device)
        tail_logp = torch.full((len(target),), -torch.inf, device=hidden.device)
    teacher = _TopK(topk_ids, topk_logp, tail_logp)
    if chunk is None:
        chunk = rows_per_chunk(weight.shape[0])

    needs_logits = (target >= 0) | (topk_logp > -torch.inf).any(1)  # [N]
    if needs_logits.all():
        return _apply(hidden, weight, target, teacher, transform, chunk)

    # Tokens with neither target nor teacher are never multiplied by the weight.
    index = needs_logits.nonzero().squeeze(1)  # [n]
    target_logp, kl = _apply(hidden[index], weight, target[index], teacher.select(index), transform, chunk)
    zeros = target_logp.new_zeros(len(target))
    return zeros.index_copy(0, index, target_logp), zeros.index_copy(0, index, kl)


def _apply(
    hidden: Tensor, weight: Tensor, target: Tensor, teacher: _TopK, transform: LogitTransform, chunk: int
) -> tuple[Tensor, Tensor]:
    stats: tuple[Tensor, Tensor] = _TokenStats.apply(  # type: ignore[no-untyped-call]
        hidden, weight, transform.bias, target, teacher, transform, chunk
    )
    return stats


class _Context(FunctionCtx):
    """What `_TokenStats.forward` leaves for `backward`."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    transform: LogitTransform
    chunk: int
    has_teacher: list[bool]  # of each chunk: whether any of its tokens has a teacher
    first_logits: Tensor | None  # logits of the first chunk, until the backward pass has used them


class _TokenStats(torch.autograd.Function):
    """`token_stats` with its own backward pass, which recomputes the logits chunk by chunk.

    The forward pass ends with the first chunk, with which the backward pass begins, so its logits are kept in between.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        teacher: _TopK,
        transform: LogitTransform,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ids, logp, tail_logp = teacher.ids, teacher.logp.to(dtype), teacher.tail_logp.to(dtype)
        if ids.shape[1]:
            # Point unused entries at the first id of their row: masking it twice or adding 0 to it changes nothing.
            ids = torch.where(logp == -torch.inf, ids[:, :1], ids)
            has_teacher = (logp > -torch.inf).any(1)  # [N]
        else:
            has_teacher = torch.zeros_like(target, dtype=torch.bool)
        # A single device synchronisation tells which chunks need the KL.
        ctx.has_teacher = [bool(rows.any()) for rows in has_teacher.cpu().split(chunk)]

        target_logp, kl, lse, lse_tail = torch.zeros(4, len(target), dtype=dtype, device=hidden.device)  # [N] each
        z = None
        for number, start in reversed(list(enumerate(range(0, len(target), chunk)))):
            rows = slice(start, start + chunk)
            del z  # free a chunk's logits before the next chunk's are allocated
            z = logits(hidden[rows], weight, transform)  # [c, V]

            # log q[target] = z[target] - logsumexp(z)
            target_z = z.gather(1, target[rows, None].clamp(min=0)).squeeze(1)  # [c]
            lse[rows] = z.logsumexp(1)
            target_logp[rows] = torch.where(target[rows] >= 0, target_z - lse[rows], 0)

            # KL over the buckets: each of the top k, and the tail.
            if ctx.has_teacher[number]:
                topk_z = z.gather(1, ids[rows])  # [c, k]
                lse_tail[rows] = z.scatter_(1, ids[rows], -torch.inf).logsumexp(1)  # [c]
                kl[rows] = _bucket_kl(logp[rows], tail_logp[rows], topk_z, lse[rows], lse_tail[rows])
                z.scatter_(1, ids[rows], topk_z)
        ctx.save_for_backward(hidden, weight, target, ids, logp, tail_logp, lse, lse_tail)
        ctx.transform, ctx.chunk, ctx.first_logits = transform, chunk, z
        return target_logp, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_target: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, ids, logp, tail_logp, lse, lse_tail = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None  # [N, d]
        grad_weight = torch.zeros_like(weight) if needs_weight else None  # [V, d]
        grad_bias = torch.zeros(len(weight), dtype=lse.dtype, device=lse.device) if needs_bias else None  # [V]
        grad_target = torch.where(target >= 0, grad_target, 0)
        # The bucket of an empty tail must contribute nothing, even if lse_tail is -inf.
        lse_tail = torch.where(tail_logp > -torch.inf, lse_tail, torch.inf)

        for number, start in enumerate(range(0, len(target), ctx.chunk)):
            rows = slice(start, start + ctx.chunk)
            z, ctx.first_logits = ctx.first_logits, None
            if z is None:
                z = logits(hidden[rows], weight, ctx.transform)  # [c, V]
            derivative = ctx.transform.derivative(z)  # [c, V] or a float
            g_target, g_kl = grad_target[rows, None], grad_kl[rows, None]  # [c, 1]

            # Gradient with respect to the logits; dz is z's storage.
            if ctx.has_teacher[number]:
                teacher = _TopK(ids[rows], logp[rows], tail_logp[rows])
                dz = _grad_logits_(z, teacher, lse[rows, None], lse_tail[rows, None], g_target, g_kl)
            else:
                dz = z.sub_(lse[rows, None]).exp_().mul_(-g_target)
            dz.scatter_add_(1, target[rows, None].clamp(min=0), g_target)

            # Chain rule through the logit transform.
            if isinstance(derivative, Tensor) or derivative != 1.0:
                dz.mul_(derivative)
            del derivative

            # Chain rule through z = hidden @ weight.T + bias.
            if grad_bias is not None:
                grad_bias += dz.sum(0)
            dz = dz.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(dz, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(dz.T, hidden[rows])

            del z, dz  # free this chunk's logits before the next chunk's are allocated
        if grad_bias is not None:
            grad_bias = grad_bias.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _bucket_kl(logp: Tensor, tail_logp: Tensor, topk_z: Tensor, lse: Tensor, lse_tail: Tensor) -> Tensor:
    """KL [c] of the teacher's buckets to the student's.

    Args:
        logp, topk_z: [c, k] teacher log-probabilities and student logits of the top k.
        tail_logp: [c] teacher log-probability of the tail.
        lse, lse_tail: [c] logsumexp of all student logits, and of those outside the top k.
    """
    p, t = logp.exp(), tail_logp.exp()
    # torch.where, because 0 * -inf is NaN: an empty bucket contributes exactly 0.
    topk_kl = torch.where(p > 0, p * (logp - topk_z + lse[:, None]), 0).sum(1)
    return topk_kl + torch.where(t > 0, t * (tail_logp - lse_tail + lse), 0)


def _grad_logits_(z: Tensor, teacher: _TopK, lse: Tensor, lse_tail: Tensor, g_target: Tensor, g_kl: Tensor) -> Tensor:
    """Overwrite the logits z [c, V] with g_kl * dkl/dz - g_target * q; the other arguments are [c, 1]."""
    p, t = teacher.logp.exp(), teacher.tail_logp[:, None].exp()  # [c, k], [c, 1]
    q_tail = (z - lse_tail).exp_()  # [c, V], the student's distribution over the tokens outside the top k
    q_tail.scatter_(1, teacher.ids, 0.0)
    total = p.sum(1, keepdim=True) + t  # [c, 1], 1 up to the rounding of the stored values

    dz = z.sub_(lse).exp_().mul_(total * g_kl - g_target)
    return dz.sub_(q_tail.mul_(t * g_kl)).scatter_add_(1, teacher.ids, -p * g_kl)
