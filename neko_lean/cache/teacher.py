"""The teacher's pass over a batch of rows: what of its predictions is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neko_lean.cache.format import SCALE, id_dtype
from neko_lean.data import Encoded, pad
from neko_lean.finite import refuse_broken_outputs
from neko_lean.head import CHUNK_ELEMENTS
from neko_lean.modeling import CausalLM


@dataclass(frozen=True)
class Kept:
    """What is stored of P positions, one after another."""

    counts: np.ndarray  # [P] int64
    ids: np.ndarray  # [E] uint16 or int32
    scaled_p: np.ndarray  # [E] float32
    tail_logp: np.ndarray  # [P] float32


@torch.no_grad()
def hidden_states(teacher: CausalLM, batch: Sequence[Encoded], pad_id: int) -> Tensor:
    """Last hidden states [P, d] of the real positions of a batch, row after row."""
    input_ids, mask = pad([one.ids for one in batch], pad_id, teacher.device)
    return teacher.hidden(input_ids)[mask.bool()]


@torch.no_grad()
def keep(teacher: CausalLM, batch: Sequence[Encoded], pad_id: int, top_k: int, mass: float) -> Kept:
    """Each position's fewest likeliest tokens that reach `mass`, at most `top_k` of them, and the tail's mass."""
    vocab_size = teacher.head.shape[0]
    # Positions that are searched for more than one token are copied: half each keeps all of it to one chunk.
    chunk = max(1, CHUNK_ELEMENTS // (2 * vocab_size))
    hidden = hidden_states(teacher, batch, pad_id)
    parts = [_top(teacher.logits(rows), min(top_k, vocab_size), mass) for rows in hidden.split(chunk)]
    counts, ids, p, tail = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    for one, own in zip(batch, tail.split([len(one) for one in batch]), strict=True):
        # NaN where the largest logit is NaN or infinite; minus infinity where the tail is empty.
        refuse_broken_outputs(own.clamp(max=0, min=-1e9), f"row {one.row.id}")
    return Kept(counts.numpy(), ids.numpy().astype(id_dtype(vocab_size)), (p * SCALE).numpy(), tail.numpy())


def _top(z: Tensor, k: int, mass: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits z [c, V] -> counts [c], ids [E] and p [E] likeliest first, log of the mass outside them [c]. Spends z."""
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
    e.scatter_(1, torch.where(kept, ids, ids[:, :1]), 0.0)
    return kept.sum(1), ids[kept], (p / total)[kept], (e.sum(1) / total[:, 0]).log()
