"""One step's batch and its losses: forget and retain rows in one rectangle, one forward, one loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neko_lean import objectives
from neko_lean.cache import TeacherCache
from neko_lean.data import Encoded, pad
from neko_lean.head import token_stats
from neko_lean.modeling import CausalLM
from neko_lean.recipes import Recipe


@dataclass(frozen=True)
class Batch:
    """Rows of one step as a rectangle, and the positions whose next token or distribution the losses look at."""

    input_ids: Tensor  # [B, L] int64, right-padded
    mask: Tensor  # [B, L] 0/1
    index: Tensor  # [N] int64 into the flattened rectangle; forget positions first
    row: Tensor  # [N] int64, which row of the batch a position belongs to
    target: Tensor  # [N] int64, -1 where only the teacher's distribution counts
    forget: int  # the first `forget` of the N belong to forget rows
    retain_positions: int  # positions of the retain rows, padding included
    teacher: tuple[Tensor, Tensor, Tensor] | None  # as token_stats takes them, [N, k], [N, k], [N]


def make_batch(
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    teacher: TeacherCache | None,
    recipe: Recipe,
    pad_id: int,
    device: torch.device,
) -> Batch:
    """Put forget rows, then retain rows, into one rectangle and list the positions that the losses need.

    Forget rows count at the positions that predict their answer tokens. Retain rows count at every real position: the
    KL also at the last, whose distribution says whether the text ends there; cross-entropy at all but the last.
    """
    rows = [*forget, *retain]
    input_ids, mask = pad([one.ids for one in rows], pad_id, device)
    length = input_ids.shape[1]
    spans = [(max(1, one.prompt + recipe.answer_skip) - 1, len(one) - 1) for one in forget]
    spans += [(0, len(one) - (teacher is None)) for one in retain]
    index, row, target = [], [], []
    for number, (one, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
        index += [number * length + i for i in range(start, stop)]
        row += [number] * max(0, stop - start)
        kl = teacher is not None and number >= len(forget)
        target += [-1 if kl else one.ids[i + 1] for i in range(start, stop)]
    forget_count = sum(max(0, stop - start) for start, stop in spans[: len(forget)])
    taught = None
    if teacher is not None:
        ids, logp, tail = teacher.read(retain)
        # Forget positions have no teacher: their entries are all unused and their tail is empty.
        ids = torch.cat([ids.new_zeros(forget_count, ids.shape[1]), ids])
        logp = torch.cat([logp.new_full((forget_count, logp.shape[1]), -torch.inf), logp])
        tail = torch.cat([tail.new_full((forget_count,), -torch.inf), tail])
        taught = (ids.to(device), logp.to(device), tail.to(device))
    return Batch(
        input_ids=input_ids,
        mask=mask,
        index=torch.tensor(index, dtype=torch.int64, device=device),
        row=torch.tensor(row, dtype=torch.int64, device=device),
        target=torch.tensor(target, dtype=torch.int64, device=device),
        forget=forget_count,
        retain_positions=len(retain) * length,
        teacher=taught,
    )


def batch_losses(student: CausalLM, batch: Batch, recipe: Recipe) -> dict[str, Tensor]:
    """Scalars `loss`, `forget_loss` and `retain_loss` (nats, before their weights) of one batch, with gradient."""
    hidden = student.hidden(batch.input_ids, batch.mask)  # [B, L, d]
    rows = hidden.reshape(-1, hidden.shape[-1])[batch.index]  # [N, d]
    target_logp, kl = token_stats(rows, student.head, batch.target, *(batch.teacher or ()))
    split = batch.forget
    zero = target_logp.new_zeros(())
    losses = {"forget_loss": zero, "retain_loss": zero}
    if recipe.forget_objective == "ga":
        weights = objectives.token_weights(batch.row[:split], recipe.forget_reduction, len(batch.row))
        losses["forget_loss"] = objectives.gradient_ascent(target_logp[:split], weights)
    weights = objectives.token_weights(batch.row[split:], recipe.retain_reduction, batch.retain_positions)
    if recipe.retain_objective == "kl":
        losses["retain_loss"] = objectives.teacher_kl(kl[split:], weights)
    elif recipe.retain_objective == "ce":
        losses["retain_loss"] = objectives.cross_entropy(target_logp[split:], weights)
    total = recipe.forget_weight * losses["forget_loss"] + recipe.retain_weight * losses["retain_loss"]
    return {"loss": total, **losses}
