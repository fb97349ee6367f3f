"""The teacher's pass over a batch of rows: what of its predictions is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neko_lean.cache.format import SCALE, id_dtype
from neko_lean.data import EncodedExample, pad
from neko_lean.models import CHUNK_ELEMENTS, CausalLM, refuse_non_finite_outputs


@dataclass(frozen=True)
class Kept:
    """What is stored of P positions, one after another."""

    counts: np.ndarray  # [P] int64
    ids: np.ndarray  # [E] uint16 or int32
    scaled_p: np.ndarray  # [E] of the stored dtype
    tail_logp: np.ndarray  # [P] float32


@torch.no_grad()
def hidden_states(teacher: CausalLM, batch: Sequence[EncodedExample], pad_id: int) -> Tensor:
    """Last hidden states [P, d] of the real positions of a batch, row after row."""
    input_ids, mask = pad([one.input_ids for one in batch], pad_id, teacher.device)
    return teacher.hidden(input_ids)[mask.bool()]


@torch.no_grad()
def keep(
    teacher: CausalLM,
    batch: Sequence[EncodedExample],
    pad_id: int,
    top_k: int,
    mass: float,
    stored_dtype: str = "float16",
) -> Kept:
    """Each position's fewest likeliest tokens that reach `mass`, at most `top_k` of them, and the tail's mass.

    Tokens whose probability is 0 as `stored_dtype` holds it belong to the tail. Raises NekoLeanError naming the first
    row for which the teacher's output is NaN or infinite.
    """
    vocab_size = teacher.head.shape[0]
    # Positions that are searched for more than one token are copied: half each keeps all of it to one chunk.
    chunk = max(1, CHUNK_ELEMENTS // (2 * vocab_size))
    hidden = hidden_states(teacher, batch, pad_id)
    k, dtype = min(top_k, vocab_size), getattr(torch, stored_dtype)
    parts = [_top(teacher.logits(rows), k, mass, dtype) for rows in hidden.split(chunk)]
    counts, ids, scaled_p, tail = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    starts = [0, *counts.cumsum(0).tolist()]
    ends = np.cumsum([len(one) for one in batch])
    for one, end in zip(batch, ends, strict=True):
        start = end - len(one)
        # NaN where the largest logit is NaN or infinite; minus infinity where the tail is empty.
        refuse_non_finite_outputs(tail[start:end].clamp(max=0, min=-1e9), f"row {one.example.id}")
        refuse_non_finite_outputs(scaled_p[starts[start] : starts[end]], f"row {one.example.id}")
    return Kept(counts.numpy(), ids.numpy().astype(id_dtype(vocab_size)), scaled_p.numpy(), tail.numpy())


def _top(z: Tensor, k: int, mass: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits z [c, V] -> counts [c], ids [E] and p * SCALE [E] of `dtype` likeliest first, log of the mass outside them
    [c]. Spends z."""
    most, likeliest = z.max(1, keepdim=True)  # [c, 1]
    e = z.sub_(most).exp_()  # [c, V], 1 at the likeliest token
    total = e.sum(1, keepdim=True)  # [c, 1]; dividing all of e by it would cost another pass
    if mass < 1:
        p, ids = (torch.cat([one, one.new_zeros(len(e), k - 1)], dim=1) for one in (torch.ones_like(most), likeliest))
        # Most positions of a teacher that knows its rows are told by one token: only the others are searched for more.
        for width in sorted({min(8, k), k}):
            short = (p.sum(1) < mass * total[:, 0]).nonzero().squeeze(1)
            if width > 1 and len(short):
                p[short, :width], ids[short, :width] = e[short].topk(width, dim=1)
        # A token is kept while those before it fall short of the mass.
        kept = (p.cumsum(1) - p < mass * total) & (p > 0)  # [c, k]
    else:
        p, ids = e.topk(k, dim=1)
        kept = torch.ones_like(p, dtype=torch.bool)
    p = p / total
    scaled_p = (p * SCALE).to(dtype)
    kept &= scaled_p != 0  # what underflows; NaN stays, for the caller to find
    inside = torch.where(kept, p, 0).sum(1)  # [c]
    e.scatter_(1, torch.where(kept, ids, ids[:, :1]), 0.0)
    outside = e.sum(1) / total[:, 0]  # [c], NaN where the logits are
    # Each logarithm where it is exact: far from the sum that rounding makes 1.
    tail = torch.where((inside < 0.5) & (outside > 0), (-inside).log1p(), outside.log())
    return kept.sum(1), ids[kept], scaled_p[kept], tail
