"""What the losses of a batch compare with: next tokens, teacher distributions, reference log-probabilities, levels.

Everything here is on the host, in the order of the micro-batches' selected positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neko_lean.cache import TeacherCache
from neko_lean.data import EncodedExample
from neko_lean.recipe import Recipe, needs_alternatives, needs_forget_cache, trains_on_teacher
from neko_lean.training.levels import unseen_span

TopK = tuple[Tensor, Tensor, Tensor]  # ids [N, k], log-probabilities [N, k], log of the tail's probability [N]


@dataclass(frozen=True)
class Layout:
    """The order in which a batch's N selected positions follow one another."""

    examples: Sequence[EncodedExample]
    spans: Sequence[tuple[int, int]]  # selected positions of each example, as a half-open range
    groups: Sequence[Sequence[int]]  # examples of each micro-batch
    row: Tensor  # [N] int64, the example of each position
    next_token: Tensor  # [N] int64, the token that follows; -1 at an example's end
    unseen: Tensor  # [N] bool, whether that token is unseen if the example is the anchor's, see `unseen_span`

    @classmethod
    def of(
        cls,
        examples: Sequence[EncodedExample],
        spans: Sequence[tuple[int, int]],
        groups: Sequence[Sequence[int]],
    ) -> Layout:
        """The layout of these micro-batches."""
        row: list[int] = []
        next_token: list[int] = []
        unseen: list[bool] = []
        for number in (i for group in groups for i in group):
            start, stop = spans[number]
            row += [number] * max(0, stop - start)
            next_token += [*examples[number].input_ids[1:], -1][start:stop]
            span = unseen_span(examples[number])
            unseen += [span.start <= position < span.stop for position in range(start, stop)]
        return cls(examples, spans, groups, _int64(row), _int64(next_token), torch.tensor(unseen, dtype=torch.bool))

    @property
    def order(self) -> list[int]:
        """The examples in the order of the micro-batches."""
        return [number for group in self.groups for number in group]


@dataclass(frozen=True)
class Sources:
    """The caches of a step, and which of its examples belong to which set."""

    teacher: TeacherCache
    base: TeacherCache | None  # of the model before it learned the forget set
    anchor: TeacherCache  # its losses on the anchor are the reference for the student's
    forget_count: int  # the first examples are the forget set
    is_retain: Sequence[bool]  # the anchor included
    is_anchor: Sequence[bool]


def reference_logp_at(layout: Layout, sources: Sources, recipe: Recipe) -> Tensor | None:
    """The teacher's log-probability of each target [N] float32: of forget examples and substitutes for an objective
    that needs it, and of the anchor; 0 elsewhere. None if no example needs one."""
    values: dict[int, np.ndarray] = {}
    for number in layout.order:
        if sources.is_anchor[number]:
            values[number] = sources.anchor.target_logp(layout.examples[number])
        elif needs_forget_cache(recipe) and not sources.is_retain[number]:
            values[number] = sources.teacher.target_logp(layout.examples[number])
    if not values:
        return None
    return _at_spans([values.get(i, np.zeros(len(layout.examples[i]))) for i in layout.order], layout)


def teacher_targets_at(
    layout: Layout,
    sources: Sources,
    recipe: Recipe,
    target: Tensor,
    reference_logp: Tensor | None,
    levels: Tensor | None,
) -> TopK | None:
    """Top-k distributions, as `token_stats` takes them: the teacher's on retain examples, and on forget examples those
    of the model that the objective needs. The anchor has the base model's for an objective that learns its
    distributions, and the teacher's for all others. Unused entries elsewhere. None if no example needs one.

    At the end of an anchor document or answer the teacher's is kept: it has learned where texts of this kind end, and a
    student that unlearns this writes on until it repeats itself."""
    if not trains_on_teacher(recipe):
        return None
    objective, forget_count = recipe.forget, sources.forget_count
    reads_base = sources.base is not None and objective is not None and objective.base_top_k
    of_teacher: list[int] = []
    of_base: list[int] = []
    for number in layout.order:
        if sources.is_anchor[number] and reads_base:
            of_teacher.append(number)  # for its last position
            of_base.append(number)
        elif sources.is_retain[number] or (needs_alternatives(recipe) and number < forget_count):
            of_teacher.append(number)
        elif reads_base and number < forget_count:
            of_base.append(number)

    topk = _read(layout, sources.teacher, of_teacher) if of_teacher else None
    if sources.base is not None and of_base:
        base_topk = _read(layout, sources.base, of_base)
        has_base = layout.unseen | (layout.row < forget_count)  # [N]
        is_base = torch.isin(layout.row, _int64(of_base)) & has_base & (layout.next_token >= 0)
        topk = base_topk if topk is None else _combined(topk, base_topk, is_base)
    if topk is None:
        return None

    if objective is not None and objective.teacher_targets is not None and reference_logp is not None:
        at_forget = layout.row < forget_count
        selected = (tensor[at_forget] for tensor in (*topk, target, reference_logp))
        if levels is not None:
            changed = objective.teacher_targets(*selected, levels[at_forget])
        else:
            changed = objective.teacher_targets(*selected, **recipe.hyperparameters)
        for tensor, values in zip(topk, changed, strict=True):
            tensor[at_forget] = values
    return topk


def levels_at(layout: Layout, default: float) -> Tensor:
    """The level of each target [N] float32, in nats; `default` for examples without levels of their own."""
    examples = [layout.examples[i] for i in layout.order]
    return _at_spans([np.array(example.levels or [default] * len(example)) for example in examples], layout)


def _read(layout: Layout, teacher: TeacherCache, numbers: Sequence[int]) -> TopK:
    """The cached distributions of these examples at their spans, spread over all N positions."""
    examples = [layout.examples[i] for i in numbers]
    ids, logp, tail = teacher.read(examples)

    # The cache holds every position of an example; the batch selects its span.
    ends = np.cumsum([len(example) for example in examples])
    kept = [
        np.arange(end - len(example) + layout.spans[i][0], end - len(example) + layout.spans[i][1])
        for i, example, end in zip(numbers, examples, ends, strict=True)
    ]
    selected = torch.from_numpy(np.concatenate(kept))

    mask = torch.isin(layout.row, _int64(numbers))  # [N]
    count, k = len(layout.row), ids.shape[1]
    return (
        ids.new_zeros(count, k).masked_scatter_(mask[:, None], ids[selected]),
        logp.new_full((count, k), -torch.inf).masked_scatter_(mask[:, None], logp[selected]),
        tail.new_full((count,), -torch.inf).masked_scatter_(mask, tail[selected]),
    )


def _combined(topk: TopK, other: TopK, is_other: Tensor) -> TopK:
    """`other` at the positions `is_other` [N], and `topk` elsewhere; their k may differ."""
    width = max(topk[0].shape[1], other[0].shape[1])
    ids, logp = (
        torch.where(is_other[:, None], _widened(right, width, fill), _widened(left, width, fill))
        for left, right, fill in ((topk[0], other[0], 0), (topk[1], other[1], -torch.inf))
    )
    return ids, logp, torch.where(is_other, other[2], topk[2])


def _widened(entries: Tensor, width: int, fill: float) -> Tensor:
    """Entries [N, k] with further columns of `fill`, [N, width]."""
    return torch.nn.functional.pad(entries, (0, width - entries.shape[1]), value=fill)


def _at_spans(values: Sequence[np.ndarray], layout: Layout) -> Tensor:
    """Per-token values at the selected positions: [N] float32.

    `values` has an array for each example in the order of the micro-batches, with a value for every token except the
    first; the last position of an example, which predicts no token, gets 0.
    """
    spans = [layout.spans[i] for i in layout.order]
    parts = [np.append(value, 0)[start:stop] for value, (start, stop) in zip(values, spans, strict=True)]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
