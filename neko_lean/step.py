"""One step's batch and its losses: forget and retain rows in the same micro-batches, one forward, one loss."""

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

# What one more micro-batch costs, in positions: every layer's weights are read once more and its kernels launched.
OVERHEAD = 128


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows as micro-batches of at most `max_tokens` positions, so that padding and OVERHEAD cost least.

    Rows of like length go together, shortest first; the cuts among them are the best there are (dynamic programming
    over the sorted rows). A row longer than `max_tokens` is a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, cut = [0], [0]  # cost of the first n rows, and where their last micro-batch begins
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        starts = [n for n in range(stop) if (stop - n) * longest <= max_tokens or n == stop - 1]
        costs = {n: best[n] + (stop - n) * longest + OVERHEAD for n in starts}
        cut.append(min(costs, key=costs.__getitem__))
        best.append(costs[cut[-1]])
    groups = []
    stop = len(order)
    while stop:
        groups.append(order[cut[stop] : stop])
        stop = cut[stop]
    return groups[::-1]


@dataclass(frozen=True)
class Batch:
    """Rows of one step as micro-batches, and the N positions whose next token or distribution the losses look at.

    The N are in the order of the micro-batches; no other position reaches the head.
    """

    micro: list[Tensor]  # token ids [b, l] int64, right-padded; rows of like length together
    index: list[Tensor]  # [n] int64 into each micro-batch's flattened b * l; the n add up to N
    row: Tensor  # [N] int64, which row of the batch a position belongs to
    target: Tensor  # [N] int64, -1 where only the teacher's distribution counts
    forget: Tensor  # [N] bool, whether it belongs to a forget row
    rows: int
    tokens: int  # real positions
    retain_positions: int  # positions of the retain rows if all rows were padded to the longest
    teacher: tuple[Tensor, Tensor, Tensor] | None  # as token_stats takes them, [N, k], [N, k], [N]
    reference: Tensor | None  # the teacher's log-probability of the forget positions' targets, in their order

    @property
    def positions(self) -> int:
        """Positions that the model works on, padding included."""
        return sum(ids.numel() for ids in self.micro)


def make_batch(
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    teacher: TeacherCache | None,
    recipe: Recipe,
    pad_id: int,
    device: torch.device,
) -> Batch:
    """Put forget and retain rows into micro-batches by length and list the positions that the losses need.

    Forget rows count at the positions that predict their answer tokens (or all their tokens but the first). Retain
    rows count at every real position: the KL also at the last, whose distribution says whether the text ends there;
    cross-entropy at all but the last.
    """
    rows = [*forget, *retain]
    lengths = [len(one) for one in rows]
    everything = recipe.forget_span == "all"
    spans = [(0 if everything else max(1, one.prompt + recipe.answer_skip) - 1, len(one) - 1) for one in forget]
    spans += [(0, len(one) - (teacher is None)) for one in retain]
    # Any other way back keeps one graph, and each gradient is complete as soon as backward has passed it once.
    apart = recipe.backward == "layerwise"
    groups = micro_batches(lengths, recipe.micro_tokens) if apart else [list(range(len(rows)))]
    micro, index = [], []
    row: list[int] = []
    target: list[int] = []
    for group in groups:
        micro.append(pad([rows[i].ids for i in group], pad_id, device)[0])
        wanted: list[int] = []
        for place, number in enumerate(group):
            start, stop = spans[number]
            wanted += [place * micro[-1].shape[1] + i for i in range(start, stop)]
            row += [number] * max(0, stop - start)
            kl = teacher is not None and number >= len(forget)
            target += [-1 if kl else rows[number].ids[i + 1] for i in range(start, stop)]
        index.append(torch.tensor(wanted, dtype=torch.int64, device=device))
    of_row = torch.tensor(row, dtype=torch.int64)
    taught = None
    if teacher is not None:
        ids, logp, tail = teacher.read([rows[i] for group in groups for i in group if i >= len(forget)])
        # Forget positions have no teacher: their entries are all unused and their tail is empty.
        of_retain = of_row >= len(forget)
        taught = (
            ids.new_zeros(len(row), ids.shape[1]).masked_scatter_(of_retain[:, None], ids).to(device),
            logp.new_full((len(row), ids.shape[1]), -torch.inf).masked_scatter_(of_retain[:, None], logp).to(device),
            tail.new_full((len(row),), -torch.inf).masked_scatter_(of_retain, tail).to(device),
        )
    reference = None
    if recipe.forget_objective == "npo" and teacher is not None:
        reference = teacher.read_forget([rows[i] for group in groups for i in group if i < len(forget)]).to(device)
    return Batch(
        micro=micro,
        index=index,
        row=of_row.to(device),
        target=torch.tensor(target, dtype=torch.int64, device=device),
        forget=(of_row < len(forget)).to(device),
        rows=len(rows),
        tokens=sum(lengths),
        retain_positions=len(retain) * max(lengths),
        teacher=taught,
        reference=reference,
    )


def chosen_hidden(student: CausalLM, micro: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
    """Last hidden states [N, d] at chosen positions, as `LayerPass.forward` takes them, by plain forward passes."""
    rows = [student.hidden(ids).flatten(0, 1)[wanted] for ids, wanted in zip(micro, index, strict=True)]  # [n, d] each
    return torch.cat(rows)


def batch_losses(hidden: Tensor, head: Tensor, batch: Batch, recipe: Recipe) -> dict[str, Tensor]:
    """Scalars `loss`, `forget_loss` and `retain_loss` (nats, before their weights) of one batch, with gradient, from
    the last hidden states [N, d] of its positions and the head [V, d]."""
    target_logp, kl = token_stats(hidden, head, batch.target, *(batch.teacher or ()))
    forget, retain = batch.forget, ~batch.forget
    zero = target_logp.new_zeros(())
    losses = {"forget_loss": zero, "retain_loss": zero}
    if recipe.forget_objective != "none":
        losses["forget_loss"] = _forget_loss(target_logp[forget], batch, recipe)
    weights = objectives.token_weights(batch.row[retain], recipe.retain_reduction, batch.retain_positions)
    if recipe.retain_objective == "kl":
        losses["retain_loss"] = objectives.teacher_kl(kl[retain], weights)
    elif recipe.retain_objective == "ce":
        losses["retain_loss"] = objectives.cross_entropy(target_logp[retain], weights)
    total = recipe.forget_weight * losses["forget_loss"] + recipe.retain_weight * losses["retain_loss"]
    return {"loss": total, **losses}


def _forget_loss(logp: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """The recipe's forget objective of the log-probabilities [n] of a batch's forget positions."""
    row = batch.row[batch.forget]
    weights = objectives.token_weights(row, recipe.forget_reduction, len(batch.row))
    if recipe.forget_objective == "ga":
        return objectives.gradient_ascent(logp, weights)
    if recipe.forget_objective == "wga":
        return objectives.weighted_ascent(logp, weights, recipe.beta)
    if recipe.forget_objective == "calibrated":
        return objectives.calibrated(logp, weights, recipe.level)
    if recipe.forget_objective == "simnpo":
        return objectives.simnpo(logp, row, recipe.beta, recipe.gamma)
    assert batch.reference is not None
    return objectives.npo(logp, batch.reference, row, recipe.beta)
