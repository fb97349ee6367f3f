"""The one numerical primitive: what an objective needs of the vocabulary, without logits for all rows at once.

`token_stats` is the only code that touches logits in training. It walks over chunks of rows, so at most
`chunk x V` float32 logits exist at a time, keeps none of them for backward, and recomputes them there. `prediction_stats` is
its sister without a gradient: what the score asks of a token.

Logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`; most families have neither bias, scale nor
soft cap. `LogitTransform` says what a family has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32


# Rows of a bfloat16 weight lifted to float32 at a time where no mixed-precision matmul exists. At d = 2048 that is
# 8 MiB, which stays in the processor's cache: 0.23 s for 166 rows at V = 50304 against 0.40 s in slices of 8192.
WEIGHT_SLICE = 1024


@dataclass(frozen=True)
class LogitTransform:
    """How a model family turns z = hidden @ weight.T into logits: softcap * tanh(scale * (z + bias) / softcap).

    Phi, GPT-J and CodeGen have a bias, Cohere and Granite a scale, Gemma 2 and RecurrentGemma a soft cap
    (arXiv 2408.00118, section 2).
    """

    bias: Tensor | None = None  # [V], the head's
    scale: float = 1.0
    softcap: float | None = None  # None: logits are not capped

    def apply_(self, z: Tensor) -> Tensor:
        """Turn z [c, V] into logits, in place."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def of(self, tokens: Tensor) -> LogitTransform:
        """The same for some rows of the weight alone, `tokens` [c] int64."""
        return self if self.bias is None else replace(self, bias=self.bias[tokens])

    def derivative(self, logits: Tensor) -> Tensor | float:
        """d logits / d z at `logits` [c, V]; a number where it is the same everywhere."""
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


IDENTITY = LogitTransform()


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
    """Per token: log-probability of the target, and KL from the teacher to the student.

    With z the logits, q = softmax(z), K the teacher's top k with probabilities p, and t its tail mass:

        target_logp = log q[target]
        kl = sum_K p (log p - log q) + t (log t - log(1 - sum_K q))

    log(1 - sum_K q) is the logsumexp of the logits outside K minus that of all, so it survives sum_K q -> 1. The
    gradient on z is (sum_K p + t) q - p inside K and (sum_K p + t) q - t softmax(z outside K) outside; a student
    equal to its teacher gets 0. Keeping the tail as one bucket is what makes that so: dropping or renormalising it is
    biased (Sparse Logit Sampling, arXiv 2503.16870).

    Args:
        hidden: [N, d] last hidden states, bfloat16, float32 or float64.
        weight: [V, d] of the head, same dtype.
        target: [N] int64; -1 where no target is needed, and target_logp is 0 there.
        topk_ids: [N, k] int64, distinct where topk_logp is finite. None: no row has a teacher.
        topk_logp: [N, k] log p, natural logarithm; -inf marks an unused entry. The first entry of a row is used
            unless the whole row is unused (a row without a teacher, whose kl is 0).
        tail_logp: [N] log t; -inf where the tail is empty.
        transform: from hidden @ weight.T to logits; its bias gets a gradient too.
        chunk: rows per chunk; by default as many as hold CHUNK_ELEMENTS logits.

    Returns:
        (target_logp [N], kl [N]) in nats, float32 (float64 for float64 input), differentiable in hidden, weight, bias.
    """
    if topk_ids is None or topk_logp is None or tail_logp is None:
        topk_ids = target.new_zeros((len(target), 0))
        topk_logp = torch.zeros(topk_ids.shape, dtype=torch.float32, device=hidden.device)
        tail_logp = torch.full((len(target),), -torch.inf, device=hidden.device)
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
    needed = (target >= 0) | (topk_logp > -torch.inf).any(1)  # [N]
    if not needed.all():  # rows that need nothing never meet the weight
        place = needed.nonzero().squeeze(1)
        teacher = topk_ids[place], topk_logp[place], tail_logp[place]
        some: tuple[Tensor, Tensor] = _TokenStats.apply(  # type: ignore[no-untyped-call]
            hidden[place], weight, transform.bias, target[place], *teacher, transform, chunk
        )
        full = (one.new_zeros(len(target)).index_copy(0, place, one) for one in some)
        return next(full), next(full)
    both: tuple[Tensor, Tensor] = _TokenStats.apply(  # type: ignore[no-untyped-call]
        hidden, weight, transform.bias, target, topk_ids, topk_logp, tail_logp, transform, chunk
    )
    return both


class PredictionStats(NamedTuple):
    """What a model thinks of each of N tokens, [N] each, in nats where that applies."""

    logp: Tensor  # log-probability of the token
    entropy: Tensor  # of the distribution it was drawn from, which is -E[log p]
    deviation: Tensor  # standard deviation of log p under that distribution
    rank: Tensor  # int64; 1 where the token is the likeliest


@torch.no_grad()
def prediction_stats(
    hidden: Tensor, weight: Tensor, target: Tensor, transform: LogitTransform = IDENTITY
) -> PredictionStats:
    """Views of the tokens `target` [N] from last hidden states [N, d] and head [V, d], a chunk of rows at a time."""
    parts = []
    chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
    for rows, wanted in zip(hidden.split(chunk), target.split(chunk), strict=True):
        logp = logits(rows, weight, transform).log_softmax(1)  # [c, V]
        own = logp.gather(1, wanted[:, None])  # [c, 1]
        rank = (logp > own).sum(1) + 1
        p = logp.exp()
        # 0 * -inf is no number: a token that cannot be adds nothing to a mean.
        mean = torch.where(p > 0, p * logp, 0).sum(1, keepdim=True)  # [c, 1]
        spread = torch.where(p > 0, p * (logp - mean) ** 2, 0).sum(1).sqrt()
        parts.append((own[:, 0], -mean[:, 0], spread, rank))
    return PredictionStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def logits(hidden: Tensor, weight: Tensor, transform: LogitTransform = IDENTITY) -> Tensor:
    """Logits [c, V] of hidden [c, d] under the head [V, d], in float32 (float64 for float64), whatever the inputs'
    dtype; without gradient."""
    return transform.apply_(_product(hidden, weight))


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [c, d] @ weight [V, d].T as [c, V] float32 (float64 for float64)."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # No mixed-precision matmul on this device: lift the weight slice by slice, never as a whole.
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)  # [c, V]
    lifted = hidden.float()
    buffer = torch.empty(min(WEIGHT_SLICE, len(weight)), weight.shape[1], dtype=torch.float32, device=hidden.device)
    for start in range(0, weight.shape[0], WEIGHT_SLICE):
        part = weight[start : start + WEIGHT_SLICE]
        torch.mm(lifted, buffer[: len(part)].copy_(part).T, out=out[:, start : start + WEIGHT_SLICE])
    return out


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ids: Tensor,
        logp: Tensor,
        tail_logp: Tensor,
        transform: LogitTransform,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp, tail_logp = logp.to(dtype), tail_logp.to(dtype)
        # Unused entries point at the row's first id: masking it twice or adding 0 to it changes nothing.
        if ids.shape[1]:
            ids = torch.where(logp == -torch.inf, ids[:, :1], ids)
        # One look at the device tells which chunks need the teacher's part.
        taught = (logp > -torch.inf).any(1) if ids.shape[1] else torch.zeros_like(target, dtype=torch.bool)
        ctx.taught = [bool(t.any()) for t in taught.cpu().split(chunk)]  # type: ignore[attr-defined]
        target_logp, kl, lse, lse_tail = torch.zeros(4, len(target), dtype=dtype, device=hidden.device)  # [N] each
        for number, start in enumerate(range(0, len(target), chunk)):
            rows = slice(start, start + chunk)
            z = logits(hidden[rows], weight, transform)  # [c, V]
            wanted = z.gather(1, target[rows, None].clamp(min=0)).squeeze(1)  # [c]
            lse[rows] = z.logsumexp(1)
            target_logp[rows] = torch.where(target[rows] >= 0, wanted - lse[rows], 0)
            if ctx.taught[number]:  # type: ignore[attr-defined]
                inside = z.gather(1, ids[rows])  # [c, k]
                lse_tail[rows] = z.scatter_(1, ids[rows], -torch.inf).logsumexp(1)
                p, t = logp[rows].exp(), tail_logp[rows].exp()
                # where, not a product alone: 0 * -inf is no number, and an empty bucket contributes exactly 0.
                head_part = torch.where(p > 0, p * (logp[rows] - inside + lse[rows, None]), 0).sum(1)
                kl[rows] = head_part + torch.where(t > 0, t * (tail_logp[rows] - lse_tail[rows] + lse[rows]), 0)
            del z  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, target, ids, logp, tail_logp, lse, lse_tail)
        ctx.transform, ctx.chunk = transform, chunk  # type: ignore[attr-defined]
        return target_logp, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_target: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, ids, logp, tail_logp, lse, lse_tail = ctx.saved_tensors  # type: ignore[attr-defined]
        transform: LogitTransform = ctx.transform  # type: ignore[attr-defined]
        chunk: int = ctx.chunk  # type: ignore[attr-defined]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros(len(weight), dtype=lse.dtype, device=lse.device) if need_bias else None
        grad_target = torch.where(target >= 0, grad_target, 0)
        # With an empty tail nothing may come of its bucket, even where lse_tail is -inf.
        lse_tail = torch.where(tail_logp > -torch.inf, lse_tail, torch.inf)
        for number, start in enumerate(range(0, len(target), chunk)):
            rows = slice(start, start + chunk)
            z = logits(hidden[rows], weight, transform)  # [c, V]
            derivative = transform.derivative(z)
            g_target, g_kl = grad_target[rows, None], grad_kl[rows, None]  # [c, 1]
            if ctx.taught[number]:  # type: ignore[attr-defined]
                p, t = logp[rows].exp(), tail_logp[rows, None].exp()
                outside = (z - lse_tail[rows, None]).exp_()  # the student's distribution over what is not in K
                outside.scatter_(1, ids[rows], 0.0)
                total = p.sum(1, keepdim=True) + t  # 1 but for the rounding of what was stored
                dz = z.sub_(lse[rows, None]).exp_().mul_(total * g_kl - g_target)
                dz.sub_(outside.mul_(t * g_kl)).scatter_add_(1, ids[rows], -p * g_kl)
                del outside
            else:
                dz = z.sub_(lse[rows, None]).exp_().mul_(-g_target)
            dz.scatter_add_(1, target[rows, None].clamp(min=0), g_target)
            if isinstance(derivative, Tensor) or derivative != 1.0:
                dz.mul_(derivative)
            del derivative
            if grad_bias is not None:
                grad_bias += dz.sum(0)
            dz = dz.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(dz, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(dz.T, hidden[rows])
            del z, dz  # before the next chunk's are made
        if grad_bias is not None:
            grad_bias = grad_bias.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None
