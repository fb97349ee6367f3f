"""One step's batch: all its examples as micro-batches, and the positions that the losses look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from neko_lean.cache import TeacherCache
from neko_lean.data import EncodedExample, pad
from neko_lean.distributed import rank, world_size
from neko_lean.models import CausalLM
from neko_lean.recipe import Recipe, trains_on_teacher, uses_levels
from neko_lean.training.micro_batches import MicroBatches, micro_batches, split_across_ranks
from neko_lean.training.targets import Layout, Sources, TopK, levels_at, reference_logp_at, teacher_targets_at


@dataclass(frozen=True)
class Batch:
    """The examples of one step, and the N positions whose next token or distribution the losses look at.

    The N positions are in the order of the micro-batches; no other position reaches the head. Examples are numbered:
    first the forget examples, then the retain examples, then the substitutes in the order of the forget examples.
    """

    micro: MicroBatches
    sizes: list[int]  # examples in each micro-batch
    row: Tensor  # [N] int64, the example that a position belongs to
    target: Tensor  # [N] int64, the next token; -1 where only the teacher's distribution is compared
    forget: Tensor  # [N] bool, whether a position belongs to a forget example
    retain: Tensor  # [N] bool, to a retain example
    anchor: Tensor  # [N] bool, to an anchor's document or answer, at a position with a next token; part of `retain`
    rows: int  # examples
    substitutes: int  # examples that are substitutes: one for each forget example, or none
    tokens: int  # positions that are not padding
    forget_positions: int  # size of the forget examples padded to the longest of them
    retain_positions: int  # size of the retain examples padded to the longest of them
    teacher: TopK | None  # [N, k], [N, k], [N]: top-k ids, log-probabilities, tail
    reference_logp: Tensor | None  # [N] the teacher's log-probability of the target, where an objective reads it
    levels: Tensor | None  # [N] loss in nats at which a forget target counts as forgotten

    @property
    def positions(self) -> int:
        """Positions that the model processes, padding included."""
        return sum(ids.numel() for ids in self.micro.input_ids)

    @property
    def substitute(self) -> Tensor:
        """[N] bool, whether a position belongs to a substitute."""
        return ~(self.forget | self.retain)

    def on_this_rank(self) -> tuple[MicroBatches, slice]:
        """This rank's micro-batches, and the range of the N positions that they cover."""
        count = len(self.micro.input_ids) // world_size()
        own = slice(rank() * count, (rank() + 1) * count)
        start = sum(map(len, self.micro.index[: own.start]))
        covered = slice(start, start + sum(map(len, self.micro.index[own])))
        parts = MicroBatches(self.micro.input_ids[own], self.micro.position_ids[own], self.micro.index[own])
        return parts, covered


def make_batch(
    forget: Sequence[EncodedExample],
    retain: Sequence[EncodedExample],
    teacher: TeacherCache | None,
    recipe: Recipe,
    pad_id: int,
    device: torch.device,
    substitutes: Sequence[EncodedExample] = (),
    packed: bool = False,
    base: TeacherCache | None = None,
) -> Batch:
    """Arrange the examples of one step.

    Forget examples count at the positions that predict the recipe's span, substitutes at those that predict their
    answers. Retain examples count at every real position: the KL also at the last one, whose distribution says whether
    the text ends there; cross-entropy at all others.

    Args:
        forget, retain: examples of each set; either may be empty.
        teacher: the cache, if the recipe reads one.
        recipe: the run's recipe.
        pad_id: token id for padding.
        device: where the tensors go.
        substitutes: one for each forget example, or none.
        packed: concatenate the examples of a micro-batch instead of padding them.
        base: the cache of the model before it learned the forget set. An objective can read its distributions on forget
            examples, and on what it holds of the anchor. Its losses on these are the reference for the student's,
            whatever the objective.
    """
    examples = [*forget, *retain, *substitutes]
    lengths = [len(example) for example in examples]
    groups = split_across_ranks(micro_batches(lengths, recipe.micro_tokens, packed=packed), lengths, world_size())
    spans = _spans(forget, retain, substitutes, recipe)
    layout = Layout.of(examples, spans, groups)

    # Which examples belong to which set.
    is_retain = [len(forget) <= n < len(forget) + len(retain) for n in range(len(examples))]
    # Levels are losses of the base model if there is one, so losses on unseen text are compared with it too.
    anchor_cache = teacher if base is None else base
    is_anchor = _anchors(examples, is_retain, anchor_cache, recipe)
    at_forget = layout.row < len(forget)
    at_retain, at_anchor = (torch.tensor(flags, dtype=torch.bool)[layout.row] for flags in (is_retain, is_anchor))

    # What the losses compare with.
    compares_distributions = trains_on_teacher(recipe)
    target = layout.next_token.masked_fill(at_retain & ~at_anchor, -1) if compares_distributions else layout.next_token
    levels = levels_at(layout, recipe.hyperparameters.get("level", 0.0)) if uses_levels(recipe) else None
    topk = reference_logp = None
    if teacher is not None and anchor_cache is not None:
        sources = Sources(teacher, base, anchor_cache, len(forget), is_retain, is_anchor)
        reference_logp = reference_logp_at(layout, sources, recipe)
        topk = teacher_targets_at(layout, sources, recipe, target, reference_logp, levels)
    return Batch(
        micro=_micro_batches(layout, pad_id, device, packed),
        sizes=list(map(len, groups)),
        row=_to_device(layout.row, device),
        target=_to_device(target, device),
        forget=_to_device(at_forget, device),
        retain=_to_device(at_retain, device),
        anchor=_to_device(at_anchor & layout.unseen, device),
        rows=len(examples),
        substitutes=len(substitutes),
        tokens=sum(lengths),
        forget_positions=len(forget) * max(map(len, forget), default=0),
        retain_positions=len(retain) * max(map(len, retain), default=0),
        teacher=None if topk is None else _topk_to_device(topk, device),
        reference_logp=None if reference_logp is None else _to_device(reference_logp, device),
        levels=None if levels is None else _to_device(levels, device),
    )


def forget_span(example: EncodedExample, recipe: Recipe) -> tuple[int, int]:
    """The range of positions of a forget example whose next tokens get a loss.

    An objective with levels leaves out the special token that ends an answer. It says nothing of what has to be
    forgotten, and a model that unlearns it does not stop.
    """
    stop = len(example) - 1 - (example.end_length if uses_levels(recipe) else 0)
    if example.num_context:  # a later window: its first tokens were predicted in the window before
        return example.num_context - 1, stop
    is_whole = recipe.forget_span == "all" or (recipe.forget_span == "documents" and example.example.kind != "qa")
    return 0 if is_whole else max(1, example.prompt_length + recipe.answer_skip) - 1, stop


def select_hidden(student: CausalLM, micro: MicroBatches) -> Tensor:
    """Last hidden states [N, d] at the selected positions, by plain forward passes."""
    parts = zip(micro.input_ids, micro.position_ids, micro.index, strict=True)
    return torch.cat([student.hidden(ids, positions).flatten(0, 1)[index] for ids, positions, index in parts])


def _spans(
    forget: Sequence[EncodedExample],
    retain: Sequence[EncodedExample],
    substitutes: Sequence[EncodedExample],
    recipe: Recipe,
) -> list[tuple[int, int]]:
    """The range of positions of each example that the losses look at."""
    last = 0 if trains_on_teacher(recipe) else 1
    return [
        *(forget_span(example, recipe) for example in forget),
        *((0, len(example) - last) for example in retain),
        *((max(1, example.prompt_length) - 1, len(example) - 1) for example in substitutes),
    ]


def _anchors(
    examples: Sequence[EncodedExample], is_retain: Sequence[bool], cache: TeacherCache | None, recipe: Recipe
) -> list[bool]:
    """Which examples are of the anchor, if `cache` holds them. The losses on them measure what unseen text costs the
    student now."""
    if cache is None or not uses_levels(recipe):
        return [False] * len(examples)
    return [flag and cache.has_target_logp(example) for example, flag in zip(examples, is_retain, strict=True)]


def _micro_batches(layout: Layout, pad_id: int, device: torch.device, packed: bool) -> MicroBatches:
    host = torch.device("cpu")
    input_ids: list[Tensor] = []
    position_ids: list[Tensor | None] = []
    index: list[Tensor] = []
    for group in layout.groups:
        examples = [layout.examples[i] for i in group]
        lengths = [len(example) for example in examples]
        if packed:
            flat_ids = [token for example in examples for token in example.input_ids] or [pad_id]
            flat_positions = [position for length in lengths for position in range(length)] or [0]
            input_ids.append(torch.tensor([flat_ids]))
            position_ids.append(_to_device(torch.tensor([flat_positions]), device))
            offsets = [0, *accumulate(lengths)][: len(group)]
        else:
            input_ids.append(pad([example.input_ids for example in examples] or [[pad_id]], pad_id, host)[0])
            position_ids.append(None)
            offsets = [max(lengths, default=0) * number for number in range(len(group))]
        selected = [
            offset + position for offset, i in zip(offsets, group, strict=True) for position in range(*layout.spans[i])
        ]
        index.append(_to_device(torch.tensor(selected, dtype=torch.int64), device))
    return MicroBatches([_to_device(ids, device) for ids in input_ids], position_ids, index)


def _topk_to_device(topk: TopK, device: torch.device) -> TopK:
    ids, logp, tail = topk
    return _to_device(ids, device), _to_device(logp, device), _to_device(tail, device)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to a GPU from pinned memory, so that the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
