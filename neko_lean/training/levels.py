"""Levels: for each token of a forget example, the loss at which it counts as forgotten.

The teacher has never seen the anchor's documents, so its losses on them tell what the tokens of unseen documents of
this kind cost: little in a phrase that all documents share, much in a name or a number. A forget example whose tokens
cost the same is neither recognised nor avoided.
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
    """Set the levels of the forget examples from losses on unseen documents.

    A token's level is the mean loss of the same token in the same context of up to two tokens, shrunk towards shorter
    contexts. The sc examples of a task are then ranked by their mean level, and each is scaled to the mean loss of the
    anchor document of its rank, so that their losses are spread as those of unseen documents are. The qa examples of a
    task are scaled by the mean factor of its sc examples.

    Args:
        forget: forget examples.
        anchor: documents that the teacher has never seen, at least one. A task's examples are compared with the
            documents of the same task if there are any.
        losses: the teacher's losses in nats on each document, for all tokens but the first [length - 1].

    Returns the forget examples with `levels` set.

    Raises NekoLeanError if no document has two tokens.
    """
    leveled: dict[int, EncodedExample] = {}
    for examples, documents in _tasks(forget, anchor, losses):
        leveled |= _with_levels_of_task(examples, [anchor[i] for i in documents], [losses[i] for i in documents])
    return [leveled[number] for number in range(len(forget))]


def with_spread(
    forget: Sequence[EncodedExample],
    spans: Sequence[tuple[int, int]],
    forget_losses: Sequence[np.ndarray | None],
    anchor: Sequence[EncodedExample],
    losses: Sequence[np.ndarray],
) -> list[EncodedExample]:
    """Spread the levels of forgotten documents as the losses of unseen ones are spread.

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

    Returns the forget examples with the new levels.
    """
    spread = list(forget)
    for examples, documents in _tasks(forget, anchor, losses):
        unseen = np.concatenate([losses[i] for i in documents])
        for number, encoded in examples.items():
            of_teacher, span = forget_losses[number], slice(*spans[number])
            levels = np.array(encoded.levels)
            estimate = levels[span]
            if of_teacher is None or not len(estimate):
                continue
            ranks = _ranks(_ranks(estimate) + _ranks(of_teacher[span]))
            quantiles = np.quantile(unseen, (ranks + 0.5) / len(ranks))
            levels[span] = quantiles * (estimate.mean() / max(quantiles.mean(), LOWEST_MEAN))
            spread[number] = replace(encoded, levels=tuple(levels))
    return spread


def _tasks(
    forget: Sequence[EncodedExample], anchor: Sequence[EncodedExample], losses: Sequence[np.ndarray]
) -> Iterator[tuple[dict[int, EncodedExample], list[int]]]:
    """The forget examples of each task by their number, and the numbers of the documents that they are compared with.

    Raises NekoLeanError if no document has two tokens.
    """
    usable = [number for number, loss in enumerate(losses) if len(loss)]
    if not usable:
        raise NekoLeanError("no document of the anchor has at least two tokens, so none has a loss; use longer ones.")
    documents_of_task: dict[str, list[int]] = defaultdict(list)
    for number in usable:
        documents_of_task[anchor[number].example.task].append(number)
    for task in sorted({encoded.example.task for encoded in forget}):
        documents = documents_of_task.get(task) or documents_of_task.get(ANCHOR_TASK) or usable
        yield {number: encoded for number, encoded in enumerate(forget) if encoded.example.task == task}, documents


def _with_levels_of_task(
    examples: Mapping[int, EncodedExample], anchor: Sequence[EncodedExample], losses: Sequence[np.ndarray]
) -> dict[int, EncodedExample]:
    """`with_levels` for the examples of one task, by their number in the forget set."""
    estimate = _TokenLossEstimate(anchor, losses)
    levels = {number: estimate(encoded.input_ids) for number, encoded in examples.items()}

    # Rank the documents by mean level, and scale each to the quantile of the anchor's losses at its rank.
    anchor_means = np.array([loss.mean() for loss in losses])
    documents = [number for number in examples if examples[number].example.kind != "qa" and levels[number].sum()]
    documents.sort(key=lambda number: levels[number].mean())
    ranks = (np.arange(len(documents)) + 0.5) / max(1, len(documents))
    targets = np.quantile(anchor_means, ranks)
    scales = {n: float(target / levels[n].mean()) for n, target in zip(documents, targets, strict=True)}

    # Questions and answers get the mean factor.
    mean_scale = float(np.mean(list(scales.values()))) if scales else 1.0
    return {
        number: replace(encoded, levels=tuple(levels[number] * scales.get(number, mean_scale)))
        for number, encoded in examples.items()
    }


class _TokenLossEstimate:
    """Mean loss of a token in its context, estimated from documents of one kind."""

    def __init__(self, documents: Sequence[EncodedExample], losses: Sequence[np.ndarray]) -> None:
        # Sum of losses and number of occurrences, by context.
        self.sums: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for document, document_losses in zip(documents, losses, strict=True):
            for position, loss in enumerate(document_losses, start=1):
                for context in _contexts(document.input_ids, position):
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
