"""Which examples each step of a run takes, and with which learning rate.

Everything follows from the recipe, the examples' lengths and the seed, so a resumed run draws the same order again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from neko_lean.data import paired_batches, random_batches
from neko_lean.errors import NekoLeanError
from neko_lean.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """A number of steps on some of the forget examples, with a new optimizer and learning rate schedule."""

    forget: list[int]
    """Indices of the forget examples."""

    steps: int
    """Steps of the phase."""


COOLDOWN = 0.2  # of the steps before it
FORGOTTEN = 0.95  # from this share on, the forget set counts as forgotten: levels are estimates
FORGOTTEN_EXACTLY = 0.97  # the same where each token counts by itself
RETAINED = 0.95  # of the retain answers that the model gave before: from this share on, they count as retained


def learning_rate(recipe: Recipe, step: int, steps: int, cooldown_from: int = 0) -> float:
    """Learning rate of step `step` (from 1) of a phase of `steps` steps.

    It rises linearly during the warm-up, and is then constant or falls linearly to 0. With `stop="forgotten"` it is
    constant up to the step `cooldown_from` (0 if that is not known yet), and then falls linearly to 0.
    """
    assert not isinstance(recipe.lr, str)
    done = (step - 1) / steps
    if done < recipe.warmup:
        return recipe.lr * step / (recipe.warmup * steps)
    if recipe.stop == "forgotten":
        start = cooldown_from or latest_cooldown(steps)
        length = cooldown_steps(start)
        return recipe.lr * min(1.0, max(0, start + length + 1 - step) / (length + 1))
    return recipe.lr if recipe.schedule == "constant" else recipe.lr * (1 - done) / (1 - recipe.warmup)


def cooldown_steps(start: int) -> int:
    """Number of steps with a falling learning rate after `start` steps, for `stop="forgotten"`."""
    return max(1, round(COOLDOWN * start))


def latest_cooldown(steps: int) -> int:
    """Step after which the learning rate falls at the latest, so that a run of `steps` steps ends with a low one."""
    return max(start for start in range(steps) if start + cooldown_steps(start) <= steps) if steps > 1 else 0


def is_forgotten(evaluated: Mapping[str, float], *, exact: bool) -> bool:
    """Whether an evaluation found the loss on the forget set at the level of unseen text.

    Args:
        evaluated: values of the evaluation.
        exact: whether each token counts by itself, because the student learns a base model's distributions.
    """
    return evaluated.get("eval_forgotten", 0.0) >= (FORGOTTEN_EXACTLY if exact else FORGOTTEN)


def is_retained(evaluated: Mapping[str, float], before: float | None) -> bool:
    """Whether an evaluation found the answers to retain questions as they were; True if there are none.

    Args:
        evaluated: values of the evaluation.
        before: `eval_retain_exact` before the first step.
    """
    return before is None or evaluated["eval_retain_exact"] >= RETAINED * before


def phases(recipe: Recipe, forget: Sequence[int], retain: Sequence[int], rng: random.Random) -> list[Phase]:
    """The phases of a run.

    There is one phase, except with `order="chunks"`: then the forget examples are shuffled and cut into chunks of
    `chunk_rows`, and each chunk is a phase of `epochs` passes over it (see recipe/sequential.toml). If `max_steps` is
    above 0, it is the length of the single phase, or limits the chunks' steps.

    Args:
        recipe: the run's recipe.
        forget, retain: lengths of the examples in tokens.
        rng: source of the order.
    """
    if recipe.order != "chunks":
        steps = recipe.max_steps or max(1, math.ceil(recipe.epochs * _steps_per_epoch(recipe, forget, retain)))
        return [Phase(list(range(len(forget))), steps)]

    order = list(range(len(forget)))
    rng.shuffle(order)
    chunks: list[Phase] = []
    steps_left: float = recipe.max_steps or math.inf
    for start in range(0, len(order), recipe.chunk_rows):
        indices = order[start : start + recipe.chunk_rows]
        epoch = _steps_per_epoch(recipe, [forget[i] for i in indices], [])
        steps = int(min(steps_left, math.ceil(recipe.epochs * epoch)))
        if steps:
            chunks.append(Phase(indices, steps))
        steps_left -= steps
    return chunks


def total_steps(recipe: Recipe, forget: Sequence[int], retain: Sequence[int], seed: int) -> int:
    """Steps of all phases of a run.

    Args:
        recipe: the run's recipe.
        forget, retain: lengths of the examples in tokens.
        seed: the run's random seed.

    Raises NekoLeanError if there are none.
    """
    steps = sum(phase.steps for phase in phases(recipe, forget, retain, random.Random(seed)))
    if not steps:
        raise NekoLeanError(
            f"recipe {recipe.name} makes no training step of {len(forget) + len(retain)} examples; set max_steps."
        )
    return steps


def evaluation_sample(
    recipe: Recipe, forget: Sequence[int], retain: Sequence[int], seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the forget and retain examples of a run's evaluations, at most `eval_rows` each.

    The arguments are those of `total_steps`.
    """
    rng = random.Random(f"{seed} evaluation")
    forget_sample, retain_sample = (
        rng.sample(range(len(lengths)), min(recipe.eval_rows, len(lengths))) for lengths in (forget, retain)
    )
    return forget_sample, retain_sample


def _steps_per_epoch(recipe: Recipe, forget: Sequence[int], retain: Sequence[int]) -> int:
    """Steps until the set with more batches is used up. Alternating steps count for both sets."""
    counts = [
        len(random_batches(lengths, max_rows=max_rows, max_tokens=recipe.batch_tokens, rng=random.Random(0)))
        for lengths, max_rows in ((forget, recipe.forget_rows), (retain, recipe.retain_rows))
    ]
    return 2 * max(counts) if recipe.order == "alternating" else max(counts)


def batches(
    recipe: Recipe, phase: Phase, forget: Sequence[int], retain: Sequence[int], rng: random.Random
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the indices of the forget and retain examples of each step, without end.

    With `order="alternating"`, one of the two lists is empty in each step.

    Args:
        recipe: the run's recipe.
        phase: the phase; only its forget examples are used.
        forget, retain: lengths of all examples in tokens.
        rng: source of the order.
    """
    pairs = paired_batches(
        [forget[i] for i in phase.forget],
        retain,
        forget_rows=recipe.forget_rows,
        retain_rows=recipe.retain_rows,
        max_tokens=recipe.batch_tokens,
        rng=rng,
    )
    for phase_indices, retain_indices in pairs:
        forget_indices = [phase.forget[i] for i in phase_indices]
        if recipe.order != "alternating":
            yield forget_indices, retain_indices
            continue
        if forget_indices:
            yield forget_indices, []
        if retain_indices:
            yield [], retain_indices


def skip_steps(steps: Iterator[T], done: int, phase: Phase) -> Iterator[T]:
    """Skip the first `done` steps of a phase.

    The steps are drawn, which restores the state of the random generator. After a complete phase one more step is
    drawn, because training prepares the next batch in advance.
    """
    for _ in range(done + (done == phase.steps)):
        next(steps)
    return steps
