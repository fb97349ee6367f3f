"""Which rows a step takes: all sets together, forget and retain in turn, or the forget set chunk by chunk.

The order follows from recipe, lengths and seed alone, so a run that goes on draws it again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from neko_lean.data import paired_batches, random_batches
from neko_lean.recipes import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """So many steps on some of the forget rows, with an optimizer and a learning rate that begin anew."""

    forget: list[int]  # numbers of forget rows
    steps: int


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate of a phase's step 1..steps: a linear rise over the warm-up, then constant or linear to 0."""
    done = (step - 1) / steps
    if done < recipe.warmup:
        return recipe.lr * step / (recipe.warmup * steps)
    return recipe.lr if recipe.schedule == "constant" else recipe.lr * (1 - done) / (1 - recipe.warmup)


def phases(recipe: Recipe, forget: Sequence[int], retain: Sequence[int], rng: random.Random) -> list[Phase]:
    """The phases of a run over rows of these lengths.

    One phase, but for order 'chunks': there the forget rows are shuffled and cut into chunks of `chunk_rows`, and each
    is a phase of `epochs` passes over it (what won SemEval-2025 Task 4, see recipes/sequential.toml). A `max_steps`
    above 0 is the length of the one phase, or where the chunks end.
    """
    if recipe.order != "chunks":
        steps = recipe.max_steps or max(1, math.ceil(recipe.epochs * _steps_of_epoch(recipe, forget, retain)))
        return [Phase(list(range(len(forget))), steps)]
    order = list(range(len(forget)))
    rng.shuffle(order)
    found: list[Phase] = []
    left: float = recipe.max_steps or math.inf
    for start in range(0, len(order), recipe.chunk_rows):
        chunk = order[start : start + recipe.chunk_rows]
        wanted = min(left, math.ceil(recipe.epochs * _steps_of_epoch(recipe, [forget[i] for i in chunk], [])))
        if wanted:
            found.append(Phase(chunk, int(wanted)))
        left -= wanted
    return found


def _steps_of_epoch(recipe: Recipe, forget: Sequence[int], retain: Sequence[int]) -> int:
    """Steps that the set with more batches takes; in turn, those of both."""
    counts = [
        len(random_batches(lengths, max_rows=most, max_tokens=recipe.batch_tokens, rng=random.Random(0)))
        for lengths, most in ((forget, recipe.forget_rows), (retain, recipe.retain_rows))
    ]
    return 2 * max(counts) if recipe.order == "alternating" else max(counts)


def batches(
    recipe: Recipe, phase: Phase, forget: Sequence[int], retain: Sequence[int], rng: random.Random
) -> Iterator[tuple[list[int], list[int]]]:
    """Endless steps of (forget rows, retain rows) of one phase, by number; in order 'alternating' one is empty."""
    pairs = paired_batches(
        [forget[i] for i in phase.forget],
        retain,
        forget_rows=recipe.forget_rows,
        retain_rows=recipe.retain_rows,
        max_tokens=recipe.batch_tokens,
        rng=rng,
    )
    for left, right in pairs:
        chosen = [phase.forget[i] for i in left]
        if recipe.order != "alternating":
            yield chosen, right
            continue
        if chosen:
            yield chosen, []
        if right:
            yield [], right


def after(steps: Iterator[T], done: int, phase: Phase) -> Iterator[T]:
    """A phase's steps behind the first `done`. Drawing them again brings the generator of random numbers to where it
    stood; behind a phase that is over it stands one step further, as the next batch is always made ahead."""
    for _ in range(done + (done == phase.steps)):
        next(steps)
    return steps
