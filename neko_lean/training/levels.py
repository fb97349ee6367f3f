"""How unlikely each token of a forget row would be to a model that never saw it, judged from documents it never saw.

The teacher has never seen the anchor's documents, so its losses on them say what the tokens of an unseen document of
the same kind cost: little in a phrase that every document shares, much in a name or a number. A forget row whose tokens
cost the same stands out neither by being known nor by being avoided.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from neko_lean.data import TASK, EncodedExample
from neko_lean.errors import NekoLeanError

ORDERS = (1, 2, 3)  # tokens of context, the token itself among them, that an estimate looks at


PRIOR = 2.0  # occurrences that the shorter context's estimate counts as


class _Estimate:
    """Mean loss of a token by its nearest context, from documents of one kind, shrunk towards shorter contexts."""

    def __init__(self, documents: Sequence[EncodedExample], losses: Sequence[np.ndarray]) -> None:
        self.sums: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for one, loss in zip(documents, losses, strict=True):
            for place, value in enumerate(loss, start=1):
                for context in _contexts(one.input_ids, place):
                    entry = self.sums[context]
                    entry[0] += float(value)
                    entry[1] += 1
        # What a token costs that these documents hold once is the best guess for one that they do not hold.
        once = [total for context, (total, count) in self.sums.items() if len(context) == 1 and count == 1]
        self.unknown = float(np.mean(once or np.concatenate(losses)))

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """Nats of every token but the first: [len(ids) - 1]."""
        values = np.empty(len(ids) - 1)
        for place in range(1, len(ids)):
            guess = self.unknown
            for context in _contexts(ids, place):
                total, count = self.sums.get(context, (0.0, 0.0))
                guess = (total + PRIOR * guess) / (count + PRIOR)
            values[place - 1] = guess
        return values


def _contexts(ids: Sequence[int], place: int) -> list[tuple[int, ...]]:
    return [tuple(ids[place + 1 - order : place + 1]) for order in ORDERS if order <= place + 1]


def with_levels(
    forget: Sequence[EncodedExample], anchor: Sequence[EncodedExample], losses: Sequence[np.ndarray]
) -> list[EncodedExample]:
    """The forget rows, each token with the nats that it would cost if it had never been seen.

    Args:
        forget: encoded forget rows.
        anchor: at least one encoded document that the teacher never saw; those of a row's task where there are any.
        losses: the teacher's loss of every token but the first of each, in nats: [len - 1] each.

    A token's cost is the mean over the same token in the same context of up to two tokens, shrunk towards shorter
    contexts. The sc rows of a task are then ranked by their mean cost, and each is scaled to the mean loss of the
    anchor document of its rank, so that their losses are spread as those of unseen documents are; qa rows are scaled
    as the task's sc rows are on average.
    """
    by_task: dict[str, list[int]] = defaultdict(list)
    usable = [number for number, loss in enumerate(losses) if len(loss)]
    if not usable:
        raise NekoLeanError("no document of the anchor has two tokens, so none has a loss: give longer ones.")
    for number in usable:
        by_task[anchor[number].example.task].append(number)
    leveled: dict[int, EncodedExample] = {}
    for task in sorted({one.example.task for one in forget}):
        pool = by_task.get(task) or by_task.get(TASK) or usable
        rows = {n: one for n, one in enumerate(forget) if one.example.task == task}
        leveled |= _of_task(rows, [anchor[i] for i in pool], [losses[i] for i in pool])
    return [leveled[n] for n in range(len(forget))]


def _of_task(
    rows: Mapping[int, EncodedExample], anchor: Sequence[EncodedExample], losses: Sequence[np.ndarray]
) -> dict[int, EncodedExample]:
    estimate = _Estimate(anchor, losses)
    raw = {n: estimate(one.input_ids) for n, one in rows.items()}
    unseen = np.array([loss.mean() for loss in losses])
    documents = sorted((n for n in rows if rows[n].example.kind == "sc" and raw[n].sum()), key=lambda n: raw[n].mean())
    wanted = np.quantile(unseen, (np.arange(len(documents)) + 0.5) / max(1, len(documents)))
    scale = {n: float(mean / raw[n].mean()) for n, mean in zip(documents, wanted, strict=True)}
    usual = float(np.mean(list(scale.values()))) if scale else 1.0
    return {n: replace(one, levels=tuple(raw[n] * scale.get(n, usual))) for n, one in rows.items()}
