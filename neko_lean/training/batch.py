"""One step's batch and its losses: all rows of a step in the same micro-batches, one forward, one loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from neko_lean import objectives
from neko_lean.cache import TeacherCache
from neko_lean.data import EncodedExample, pad
from neko_lean.distributed import rank, world_size
from neko_lean.models import CausalLM
from neko_lean.recipes import NEED_FORGET_CACHE, Recipe

# What one more micro-batch costs, in positions: every layer's weights are read once more and its kernels launched.
OVERHEAD = 128


def micro_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Indices of rows as micro-batches of at most `max_tokens` positions, so that padding and OVERHEAD cost least.

    Rows of like length go together, shortest first; the cuts among them are the best there are (dynamic programming
    over the sorted rows). A row longer than `max_tokens` is a micro-batch of its own. Where they are `packed`, laid end
    to end, none of its positions is padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    ends = [0, *accumulate(lengths[i] for i in order)]
    best, cut = [0], [0]  # cost of the first n rows, and where their last micro-batch begins
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        sizes = [ends[stop] - ends[n] if packed else (stop - n) * longest for n in range(stop)]  # positions from n on
        starts = [n for n in range(stop) if sizes[n] <= max_tokens or n == stop - 1]
        costs = {n: best[n] + sizes[n] + OVERHEAD for n in starts}
        cut.append(min(costs, key=costs.__getitem__))
        best.append(costs[cut[-1]])
    groups = []
    stop = len(order)
    while stop:
        groups.append(order[cut[stop] : stop])
        stop = cut[stop]
    return groups[::-1]


def split_across_ranks(groups: Sequence[Sequence[int]], lengths: Sequence[int], ranks: int) -> list[Sequence[int]]:
    """The same micro-batches for so many ranks, all of the first one's first: as many for each, since they gather each
    layer together, and of like size. Large ones are cut; where rows run out there are empty ones."""
    if ranks == 1:
        return list(groups)

    def work(group: Sequence[int]) -> int:
        return len(group) * max((lengths[i] for i in group), default=1)

    found = sorted(groups, key=work)
    while len(found) % ranks:
        most = max((group for group in found if len(group) > 1), key=work, default=None)
        if most is None:
            found.append([])
            continue
        found.remove(most)
        found += [most[: len(most) // 2], most[len(most) // 2 :]]
    shares: list[list[Sequence[int]]] = [[] for _ in range(ranks)]
    for group in sorted(found, key=work, reverse=True):
        room = [share for share in shares if len(share) < len(found) // ranks]
        min(room, key=lambda share: sum(map(work, share))).append(group)
    return [group for share in shares for group in share]


@dataclass(frozen=True)
class Batch:
    """Rows of one step as micro-batches, and the N positions whose next token or distribution the losses look at.

    The N are in the order of the micro-batches; no other position reaches the head. Row numbers count the forget rows
    first, then the retain rows, then the substitutes: the first forget row's, the second's, ...
    """

    # Token ids [b, l] int64, right-padded, rows of like length together; or packed, rows end to end [1, l].
    micro: list[Tensor]
    position_ids: list[Tensor | None]  # of packed ones, each token's position in its row [1, l] int64
    sizes: list[int]  # rows of each micro-batch
    index: list[Tensor]  # [n] int64 into each micro-batch's flattened b * l; the n add up to N
    row: Tensor  # [N] int64, which row of the batch a position belongs to
    target: Tensor  # [N] int64, -1 where only the teacher's distribution counts
    forget: Tensor  # [N] bool, whether it belongs to a forget row
    retain: Tensor  # [N] bool
    anchor: Tensor  # [N] bool, whether it belongs to an anchor's document and has a next token; among retain
    rows: int
    substitutes: int  # how many of the rows are substitutes: as many as forget rows, or none
    tokens: int  # real positions
    forget_positions: int  # positions of the forget rows if each were padded to the longest of them
    retain_positions: int  # of the retain rows, likewise
    teacher: tuple[Tensor, Tensor, Tensor] | None  # as token_stats takes them, [N, k], [N, k], [N]
    reference: Tensor | None  # [N], the teacher's log-probability of the targets that are not of retain rows
    level: Tensor | None  # [N], nats at which the target of a forget position counts as forgotten

    @property
    def positions(self) -> int:
        """Positions that the model works on, padding included."""
        return sum(ids.numel() for ids in self.micro)

    def own(self) -> tuple[tuple[list[Tensor], list[Tensor], list[Tensor | None]], slice]:
        """This rank's micro-batches as (micro, index, places), and where its positions lie among the N."""
        count = len(self.micro) // world_size()
        mine = slice(rank() * count, (rank() + 1) * count)
        start = sum(map(len, self.index[: mine.start]))
        part = slice(start, start + sum(map(len, self.index[mine])))
        return (self.micro[mine], self.index[mine], self.position_ids[mine]), part

    @property
    def substitute(self) -> Tensor:
        """[N] bool, whether a position belongs to a substitute."""
        return ~(self.forget | self.retain)


def make_batch(
    forget: Sequence[EncodedExample],
    retain: Sequence[EncodedExample],
    teacher: TeacherCache | None,
    recipe: Recipe,
    pad_id: int,
    device: torch.device,
    substitutes: Sequence[EncodedExample] = (),
    packed: bool = False,
) -> Batch:
    """Put rows into micro-batches by length, end to end if `packed`, and list the positions that the losses need.

    Forget rows count at the positions that predict the recipe's span of them, substitutes (one for each forget row,
    or none) at those that predict their answers. Retain rows count at every real position: the KL also at the last,
    whose distribution says whether the text ends there; cross-entropy at all but the last.
    """
    rows = [*forget, *retain, *substitutes]
    lengths = [len(one) for one in rows]
    kl = recipe.retain_objective == "kl"
    spans = [(forget_start(one, recipe), len(one) - 1) for one in forget]
    spans += [(0, len(one) - (not kl)) for one in retain]
    spans += [(max(1, one.prompt_length) - 1, len(one) - 1) for one in substitutes]
    is_retain = [len(forget) <= n < len(forget) + len(retain) for n in range(len(rows))]
    # The losses on an anchor's documents tell what unseen text costs the student now.
    known_to = teacher.has_target_logp if teacher is not None and recipe.forget_objective == "calibrated" else None
    is_anchor = [known_to is not None and held and known_to(one) for one, held in zip(rows, is_retain, strict=True)]
    groups = split_across_ranks(micro_batches(lengths, recipe.micro_tokens, packed=packed), lengths, world_size())
    micro, position_ids = _micro(rows, groups, pad_id, device, packed)
    index, of_row, following = _laid_out(rows, spans, groups, device, packed)
    of_retain, of_anchor = (torch.tensor(flags, dtype=torch.bool)[of_row] for flags in (is_retain, is_anchor))
    target = following.masked_fill(of_retain & ~of_anchor, -1) if kl else following
    order = [number for group in groups for number in group]
    teacher_targets = reference = level = None
    if teacher is not None:
        undial = recipe.forget_objective == "undial"
        known = [i for i in order if kl and (is_retain[i] or (undial and i < len(forget)))]
        if known:
            teacher_targets = _teacher_targets(
                teacher, [rows[i] for i in known], [spans[i] for i in known], torch.tensor(known), of_row
            )
        compared = recipe.forget_objective in NEED_FORGET_CACHE
        needs_reference = {i for i in order if is_anchor[i] or (compared and not is_retain[i])}
        if needs_reference:
            values = [teacher.target_logp(rows[i]) if i in needs_reference else np.zeros(len(rows[i])) for i in order]
            reference = _at_spans(values, [spans[i] for i in order])
        if undial and teacher_targets is not None and reference is not None:
            some = of_row < len(forget)
            ids, logp, tail, aim, known_logp = (one[some] for one in (*teacher_targets, target, reference))
            pushed = objectives.undial_teacher(ids, logp, tail, aim, known_logp, recipe.gamma)
            for one, changed in zip(teacher_targets, pushed, strict=True):
                one[some] = changed
    if recipe.forget_objective == "calibrated":
        values = [np.array(rows[i].levels or [recipe.level] * len(rows[i])) for i in order]
        level = _at_spans(values, [spans[i] for i in order])
    return Batch(
        micro=micro,
        position_ids=position_ids,
        sizes=list(map(len, groups)),
        index=index,
        row=_sent(of_row, device),
        target=_sent(target, device),
        forget=_sent(of_row < len(forget), device),
        retain=_sent(of_retain, device),
        anchor=_sent(of_anchor & (target >= 0), device),
        rows=len(rows),
        substitutes=len(substitutes),
        tokens=sum(lengths),
        forget_positions=len(forget) * max(map(len, forget), default=0),
        retain_positions=len(retain) * max(map(len, retain), default=0),
        teacher=None if teacher_targets is None else tuple(_sent(one, device) for one in teacher_targets),  # type: ignore[arg-type]
        reference=None if reference is None else _sent(reference, device),
        level=None if level is None else _sent(level, device),
    )


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to a GPU out of pinned memory, so that nobody on the host waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _micro(
    rows: Sequence[EncodedExample], groups: Sequence[Sequence[int]], pad_id: int, device: torch.device, packed: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Micro-batches and the places in them, as Batch has them."""
    host = torch.device("cpu")
    if not packed:
        padded = [pad([rows[i].input_ids for i in group] or [[pad_id]], pad_id, host)[0] for group in groups]
        return [_sent(ids, device) for ids in padded], [None] * len(groups)
    ids = [torch.tensor([[token for i in group for token in rows[i].input_ids] or [pad_id]]) for group in groups]
    position_ids = [torch.tensor([[place for i in group for place in range(len(rows[i]))] or [0]]) for group in groups]
    return [_sent(one, device) for one in ids], [_sent(one, device) for one in position_ids]


def _laid_out(
    rows: Sequence[EncodedExample],
    spans: Sequence[tuple[int, int]],
    groups: Sequence[Sequence[int]],
    device: torch.device,
    packed: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Positions in micro-batches, as Batch has them; on the host, each position's row [N] and the token that follows it
    [N], -1 at a row's end."""
    index = []
    row: list[int] = []
    following: list[int] = []
    for group in groups:
        lengths = [len(rows[i]) for i in group]
        starts = [0, *accumulate(lengths)] if packed else [max(lengths, default=0) * n for n in range(len(group))]
        wanted: list[int] = []
        for first, number in zip(starts, group, strict=False):
            start, stop = spans[number]
            wanted += [first + i for i in range(start, stop)]
            row += [number] * max(0, stop - start)
            following += [*rows[number].input_ids[1:], -1][start:stop]
        index.append(_sent(torch.tensor(wanted, dtype=torch.int64), device))
    return index, torch.tensor(row, dtype=torch.int64), torch.tensor(following, dtype=torch.int64)


def forget_start(one: EncodedExample, recipe: Recipe) -> int:
    """First position of a forget row whose next token is pushed."""
    whole = recipe.forget_span == "all" or (recipe.forget_span == "documents" and one.example.kind == "sc")
    return 0 if whole else max(1, one.prompt_length + recipe.answer_skip) - 1


def _teacher_targets(
    teacher: TeacherCache,
    rows: Sequence[EncodedExample],
    spans: Sequence[tuple[int, int]],
    numbers: Tensor,
    of_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the cache holds of these rows at their spans, laid out over all N positions as token_stats takes it.

    Elsewhere the entries are all unused and the tail is empty.
    """
    ids, logp, tail = teacher.read(rows)
    ends = np.cumsum([len(one) for one in rows])
    used = [slice(end - len(one) + a, end - len(one) + b) for one, end, (a, b) in zip(rows, ends, spans, strict=True)]
    place = torch.from_numpy(np.concatenate([np.arange(len(ids))[one] for one in used]))
    some = torch.isin(of_row, numbers)
    count, k = len(of_row), ids.shape[1]
    return (
        ids.new_zeros(count, k).masked_scatter_(some[:, None], ids[place]),
        logp.new_full((count, k), -torch.inf).masked_scatter_(some[:, None], logp[place]),
        tail.new_full((count,), -torch.inf).masked_scatter_(some, tail[place]),
    )


def _at_spans(values: Sequence[np.ndarray], spans: Sequence[tuple[int, int]]) -> Tensor:
    """Values of a row's tokens but the first, one array a row, at the positions that count: [N] float32; 0 at a row's
    end."""
    parts = [np.append(value, 0)[start:stop] for value, (start, stop) in zip(values, spans, strict=True)]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def select_hidden(
    student: CausalLM,
    micro: Sequence[Tensor],
    index: Sequence[Tensor],
    position_ids: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Last hidden states [N, d] at chosen positions, as `LayerPass.forward` takes them, by plain forward passes."""
    parts = zip(micro, index, position_ids or [None] * len(micro), strict=True)
    return torch.cat([student.hidden(ids, place).flatten(0, 1)[wanted] for ids, wanted, place in parts])
