"""Run the teacher on a batch of examples, and select what the cache stores of its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neko_lean.cache.format import SCALE, id_dtype
from neko_lean.data import EncodedExample, pad
from neko_lean.models import CHUNK_ELEMENTS, CausalLM, next_token_logp, refuse_non_finite_outputs


@dataclass(frozen=True)
class TopK:
    """The stored tokens of P positions, with E entries in total."""

    counts: np.ndarray  # [P] int64, number of entries of each position
    ids: np.ndarray  # [E] uint16 or int32, most likely token first within each position
    scaled_p: np.ndarray  # [E] float16 or float32, probability times SCALE
    tail_logp: np.ndarray  # [P] float32, log of the probability outside the entries


@torch.no_grad()
def hidden_states(teacher: CausalLM, batch: Sequence[EncodedExample], pad_id: int) -> Tensor:
    """Last hidden states of a batch, without padding and shots: [P, d], one example after another."""
    input_ids, mask = pad([example.ids_with_shots for example in batch], pad_id, teacher.device)
    starts = torch.tensor([[len(example.shots)] for example in batch], device=teacher.device)  # [B, 1]
    is_own = mask.bool() & (torch.arange(mask.shape[1], device=teacher.device) >= starts)  # [B, L]
    return teacher.hidden(input_ids)[is_own]


@torch.no_grad()
def top_k_entries(
    teacher: CausalLM,
    batch: Sequence[EncodedExample],
    pad_id: int,
    top_k: int,
    mass: float,
    stored_dtype: str = "float16",
) -> TopK:
    """Select the fewest most likely tokens of each position whose probabilities sum to `mass`, at most `top_k`.

    Tokens whose probability underflows in `stored_dtype` are left to the tail.

    Raises:
        NekoLeanError: if the teacher's output is NaN or infinite; names the first such example.
    """
    vocab_size = teacher.head.shape[0]
    # Positions with more than one entry are copied, so half a chunk of logits keeps the total within one chunk.
    chunk = max(1, CHUNK_ELEMENTS // (2 * vocab_size))
    hidden = hidden_states(teacher, batch, pad_id)
    k, dtype = min(top_k, vocab_size), getattr(torch, stored_dtype)
    parts = [_select(teacher.logits(rows), k, mass, dtype) for rows in hidden.split(chunk)]
    counts, ids, scaled_p, tail_logp = (torch.cat(column).cpu() for column in zip(*parts, strict=True))

    # Name the first example with NaN or infinite outputs.
    entry_starts = [0, *counts.cumsum(0).tolist()]
    ends = np.cumsum([len(example) for example in batch])
    for example, end in zip(batch, ends, strict=True):
        start, name = end - len(example), f"row {example.example.id}"
        # NaN if the largest logit is NaN or infinite. Minus infinity is fine: it means an empty tail.
        refuse_non_finite_outputs(tail_logp[start:end].clamp(max=0, min=-1e9), name)
        refuse_non_finite_outputs(scaled_p[entry_starts[start] : entry_starts[end]], name)
    return TopK(counts.numpy(), ids.numpy().astype(id_dtype(vocab_size)), scaled_p.numpy(), tail_logp.numpy())


@torch.no_grad()
def target_logps(teacher: CausalLM, batch: Sequence[EncodedExample], pad_id: int) -> np.ndarray:
    """Log-probability, in nats, of every token except the first of each example: [P] float32.

    Raises:
        NekoLeanError: if the teacher's output is NaN or infinite; names the first such example.
    """
    logp = next_token_logp(teacher, [example.ids_with_shots for example in batch], pad_id).cpu()
    sizes = [len(example.ids_with_shots) - 1 for example in batch]
    parts = [part[len(example.shots) :] for example, part in zip(batch, logp.split(sizes), strict=True)]
    for example, part in zip(batch, parts, strict=True):
        refuse_non_finite_outputs(part, f"row {example.example.id}")
    values: np.ndarray = torch.cat(parts).numpy()
    return values


def _select(z: Tensor, k: int, mass: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select the entries of c positions from their logits, which are overwritten.

    Args:
        z: logits [c, V].
        k: maximum number of entries per position, at most V.
        mass: probability that the entries of a position must reach, in (0, 1].
        dtype: dtype of the stored probabilities.

    Returns:
        counts [c], ids [E], p * SCALE [E] of `dtype`, and the log of the probability outside the entries [c].
    """
    # Exponentiate relative to the most likely token. Dividing all of `e` by `total` would cost another pass.
    z_max, argmax = z.max(1, keepdim=True)  # [c, 1]
    e = z.sub_(z_max).exp_()  # [c, V], 1 at the most likely token
    total = e.sum(1, keepdim=True)  # [c, 1]

    if mass < 1:
        # Most positions of a confident teacher need a single token. Search only the others, first for 8 tokens.
        p, ids = (
            torch.cat([column, column.new_zeros(len(e), k - 1)], dim=1) for column in (torch.ones_like(z_max), argmax)
        )
        for width in sorted({min(8, k), k}):
            short = (p.sum(1) < mass * total[:, 0]).nonzero().squeeze(1)
            if width > 1 and len(short):
                p[short, :width], ids[short, :width] = e[short].topk(width, dim=1)
        # Take a token if the more likely tokens fall short of the mass.
        selected = (p.cumsum(1) - p < mass * total) & (p > 0)  # [c, k]
    else:
        p, ids = e.topk(k, dim=1)
        selected = torch.ones_like(p, dtype=torch.bool)

    # Leave tokens that underflow to the tail. NaN is not 0, so it remains for the caller to find.
    p = p / total
    scaled_p = (p * SCALE).to(dtype)
    selected &= scaled_p != 0

    # Of the two formulas for the tail, use the one that is exact: 1 - inside loses precision near 1.
    inside = torch.where(selected, p, 0).sum(1)  # [c]
    e.scatter_(1, torch.where(selected, ids, ids[:, :1]), 0.0)
    outside = e.sum(1) / total[:, 0]  # [c], NaN where the logits are
    tail_logp = torch.where((inside < 0.5) & (outside > 0), (-inside).log1p(), outside.log())
    return selected.sum(1), ids[selected], scaled_p[selected], tail_logp
