"""Levels: for each token of a forget example, the loss at which it counts as forgotten.

The teacher has never seen the anchor, so its losses there tell what the tokens of unseen text of this kind cost: little
in a phrase that all texts share, much in a name or a number. A forget example whose tokens cost the same is neither
recognised nor avoided.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from neko_lean.data import ANCHOR_TASK, EncodedExample
from neko_lean.errors import NekoLeanError

CONTEXT_LENGTHS = (1, 2, 3)  # lengths of a token's contexts, which include the token itself
LOWEST_MEAN = 1e-6  # nats; keeps the scale of a document without any level finite
PRIOR = 2.0  # occurrences that count for the estimate from the next shorter context


def with_levels(
    forget: Sequence[EncodedExample], anchor: Sequence[EncodedExample], losses: Sequence[np.ndarray]
) -> list[EncodedExample]:
    """Set the levels of the forget examples from losses on unseen text.

    A token's level is the mean loss of the same token in the same context of up to two tokens, shrunk towards shorter
    contexts. The documents of a task are then ranked by their mean level, and each is scaled to the mean loss of the
    anchor document of its rank, so that their losses are spread as those of unseen documents are. Questions are scaled
    by the mean factor of the documents of their task; or, if the anchor has questions of the task, compared with these
    in the same way as documents with documents. Of questions, only the answers count.

    Args:
        forget: forget examples.
        anchor: documents and questions that the teacher has never seen, at least one. A task's examples are compared
            with those of the same task if there are any.
        losses: the teacher's losses in nats on each, for all tokens but the first [length - 1].

    Returns the forget examples with `levels` set.

    Raises NekoLeanError if nothing in the anchor has two tokens.
    """
    leveled: dict[int, EncodedExample] = {}
    for examples, compared in _groups(forget, anchor, losses):
        leveled |= _with_levels_of_group(examples, [anchor[i] for i in compared], [losses[i] for i in compared])
    return [leveled[number] for number in range(len(forget))]


def with_spread(
    forget: Sequence[EncodedExample],
    spans: Sequence[tuple[int, int]],
    forget_losses: Sequence[np.ndarray | None],
    anchor: Sequence[EncodedExample],
    losses: Sequence[np.ndarray],
) -> list[EncodedExample]:
    """Spread the levels of forget examples as the losses of unseen text of the same kind are spread.

    `with_levels` estimates means. Most losses of a real text are near 0 and a few are very high, and the min-k attacks
    recognise a text whose losses all lie in between. The teacher knows which tokens were surprising: its loss on them
    is small, but still larger than on the others (SHRED, arXiv 2605.07482, selects tokens by it). Therefore the tokens
    of a document are ranked by both, the estimate and the teacher's loss, and the levels are the quantiles of the
    anchor's losses at these ranks, scaled so that the document's mean level stays the same.

    Args:
        forget: forget examples with levels.
        spans: the range of positions of each that get a loss; the levels of others are not changed.
        forget_losses: the teacher's losses in nats on each, for all tokens but the first [length - 1]; None for an
            example whose levels are not changed.
        anchor, losses: as in `with_levels`.

    Returns the forget examples with the new levels: documents if the anchor has documents to compare them with, and
    questions if it has questions.
    """
    spread = list(forget)
    for examples, compared in _groups(forget, anchor, losses):
        unseen = np.concatenate([losses[i][unseen_span(anchor[i])] for i in compared])
        kind = _is_question(anchor[compared[0]])
        for number, encoded in examples.items():
            of_teacher, span = forget_losses[number], slice(*spans[number])
            levels = np.array(encoded.levels)
            estimate = levels[span]
            if of_teacher is None or not len(estimate) or _is_question(encoded) != kind:
                continue
            ranks = _ranks(_ranks(estimate) + _ranks(of_teacher[span]))
            quantiles = np.quantile(unseen, (ranks + 0.5) / len(ranks))
            levels[span] = quantiles * (estimate.mean() / max(quantiles.mean(), LOWEST_MEAN))
            spread[number] = replace(encoded, levels=tuple(levels))
    return spread


def unseen_span(example: EncodedExample) -> slice:
    """The positions of an anchor example whose next tokens are unseen text: all of a document; of a question those of
    its answer, without the special token that ends it."""
    if not _is_question(example):
        return slice(0, max(0, len(example) - 1))
    return slice(max(1, example.prompt_length) - 1, max(0, len(example) - 1 - example.end_length))


def _is_question(example: EncodedExample) -> bool:
    return example.example.kind == "qa"


def _groups(
    forget: Sequence[EncodedExample], anchor: Sequence[EncodedExample], losses: Sequence[np.ndarray]
) -> Iterator[tuple[dict[int, EncodedExample], list[int]]]:
    """Forget examples by their number, and the numbers of the anchor examples that they are compared with, which are
    all documents or all questions.

    Raises NekoLeanError if nothing in the anchor has two tokens.
    """
    usable = [number for number, loss in enumerate(losses) if len(loss[unseen_span(anchor[number])])]
    if not usable:
        raise NekoLeanError("no document of the anchor has at least two tokens, so none has a loss; use longer ones.")
    of_task: dict[str, list[int]] = defaultdict(list)
    for number in usable:
        of_task[anchor[number].example.task].append(number)
    for task in sorted({encoded.example.task for encoded in forget}):
        compared = of_task.get(task) or of_task.get(ANCHOR_TASK) or usable
        questions = [number for number in compared if _is_question(anchor[number])]
        documents = [number for number in compared if not _is_question(anchor[number])]
        examples = {number: encoded for number, encoded in enumerate(forget) if encoded.example.task == task}
        asked = {number: encoded for number, encoded in examples.items() if questions and _is_question(encoded)}
        if asked:
            yield asked, questions
        if len(asked) < len(examples):
            others = {number: encoded for number, encoded in examples.items() if number not in asked}
            yield others, documents or questions


def _with_levels_of_group(
    examples: Mapping[int, EncodedExample], anchor: Sequence[EncodedExample], losses: Sequence[np.ndarray]
) -> dict[int, EncodedExample]:
    """`with_levels` for examples that are compared with the same part of the anchor, by their number in the forget
    set."""
    unseen = [loss[unseen_span(example)] for example, loss in zip(anchor, losses, strict=True)]
    estimate = _TokenLossEstimate(anchor, unseen)
    levels = {number: estimate(encoded.input_ids) for number, encoded in examples.items()}
    means = {
        number: float(of_text.mean()) if len(of_text := levels[number][unseen_span(encoded)]) else 0.0
        for number, encoded in examples.items()
    }

    # Rank those of the anchor's kind by mean level, and scale each to the quantile of the anchor's losses at its rank.
    kind = _is_question(anchor[0])
    ranked = [number for number in examples if _is_question(examples[number]) == kind and means[number]]
    ranked.sort(key=means.__getitem__)
    ranks = (np.arange(len(ranked)) + 0.5) / max(1, len(ranked))
    targets = np.quantile([loss.mean() for loss in unseen], ranks)
    scales = {number: float(target / means[number]) for number, target in zip(ranked, targets, strict=True)}

    # Others get the mean factor.
    mean_scale = float(np.mean(list(scales.values()))) if scales else 1.0
    return {
        number: replace(encoded, levels=tuple(levels[number] * scales.get(number, mean_scale)))
        for number, encoded in examples.items()
    }


class _TokenLossEstimate:
    """Mean loss of a token in its context, estimated from unseen text of one kind."""

    def __init__(self, anchor: Sequence[EncodedExample], losses: Sequence[np.ndarray]) -> None:
        # Sum of losses and number of occurrences, by context.
        self.sums: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for example, unseen in zip(anchor, losses, strict=True):
            for position, loss in enumerate(unseen, start=unseen_span(example).start + 1):
                for context in _contexts(example.input_ids, position):
                    entry = self.sums[context]
                    entry[0] += float(loss)
                    entry[1] += 1

        # The best guess for a token that does not occur is the mean loss of tokens that occur once.
        rare = [total for context, (total, count) in self.sums.items() if len(context) == 1 and count == 1]
        self.unknown = float(np.mean(rare or np.concatenate(losses)))

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """Estimated loss in nats of all tokens but the first [len(ids) - 1]."""
        estimates = np.empty(len(ids) - 1)
        for position in range(1, len(ids)):
            estimate = self.unknown
            for context in _contexts(ids, position):  # from the shortest to the longest
                total, count = self.sums.get(context, (0.0, 0.0))
                estimate = (total + PRIOR * estimate) / (count + PRIOR)
            estimates[position - 1] = estimate
        return estimates


def _contexts(ids: Sequence[int], position: int) -> list[tuple[int, ...]]:
    """The contexts of the token at `position`, each of which ends with it."""
    return [tuple(ids[position + 1 - length : position + 1]) for length in CONTEXT_LENGTHS if length <= position + 1]


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, from 0 for the lowest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return ranks
