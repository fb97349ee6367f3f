"""The registry of objectives: one function each, with its requirements and hyperparameters declared next to it.

`@forget_objective("name", ...)` or `@retain_objective("name", ...)` registers a function; recipes, the batch, the cache
and the command line read what it needs from here. docs/extending.md adds one as an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class TokenInputs:
    """What an objective is computed from: vectors over the n tokens of one set (forget or retain) in a batch.

    Those that an objective does not ask for by its requirements are None.
    """

    logp: Tensor  # [n] the student's log-probability of each target token, in nats, with gradient
    row: Tensor  # [n] int64, the example that each token belongs to
    weights: Tensor  # [n] by the recipe's reduction; they add up to 1 ('positions': to less)
    teacher_kl: Tensor | None = None  # [n] KL(teacher || student) at each position, in nats, with gradient
    base_kl: Tensor | None = None  # [n] KL(base || student): the same for the model before it learned the forget set
    reference_logp: Tensor | None = None  # [n] the teacher's log-probability of each target token, in nats
    levels: Tensor | None = None  # [n] the loss at which each token counts as forgotten, in nats
    # [R] and [R]: log(student / teacher) of each example's substitute and of its forgotten answer, with gradient
    preferences: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Hyperparameter:
    """A number that one objective takes: a key of recipes with that objective."""

    default: float
    help: str
    positive: bool = True  # must be > 0; otherwise >= 0


@dataclass(frozen=True)
class Objective:
    """An objective and what it requires.

    Args:
        name: what recipes call it.
        loss: `loss(inputs: TokenInputs, **hyperparameters) -> Tensor`, a scalar in nats.
        hyperparameters: the keyword arguments of `loss`, with defaults and checks.
        base_top_k: it reads `base_kl`, and so a cache of the model before it learned the forget set (`--base-cache`).
        teacher_top_k: it reads `teacher_kl`, and so the teacher's top-k distribution from the cache.
        reference: it reads `reference_logp`: the cache must hold the forget set (`cache-teacher --forget`).
        levels: it reads `levels`, from an anchor, a base cache, or its hyperparameter `level`.
        substitute: the recipe's `substitute` that it needs, if any; then it reads `preferences`.
        row_means: it is a mean over examples by definition, so the recipe's reduction has no effect.
        teacher_targets: changes the teacher's distribution at this set's positions before the KL:
            `(topk_ids, topk_logp, tail_logp, target, reference_logp, **hyperparameters) -> (ids, logp, tail)`; for an
            objective with levels, they follow `reference_logp` in place of the hyperparameters.
    """

    name: str
    loss: Callable[..., Tensor]
    hyperparameters: Mapping[str, Hyperparameter] = field(default_factory=dict)
    teacher_top_k: bool = False
    base_top_k: bool = False
    reference: bool = False
    levels: bool = False
    substitute: str = ""
    row_means: bool = False
    teacher_targets: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None


FORGET_OBJECTIVES: dict[str, Objective] = {}
RETAIN_OBJECTIVES: dict[str, Objective] = {}


def forget_objective(
    name: str,
    *,
    hyperparameters: Mapping[str, Hyperparameter] | None = None,
    teacher_top_k: bool = False,
    base_top_k: bool = False,
    reference: bool = False,
    levels: bool = False,
    substitute: str = "",
    row_means: bool = False,
    teacher_targets: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Callable[[Loss], Loss]:
    """Register the decorated function as a forget objective; the arguments are those of `Objective`."""

    def register(loss: Loss) -> Loss:
        _add(
            FORGET_OBJECTIVES,
            Objective(
                name,
                loss,
                hyperparameters or {},
                teacher_top_k=teacher_top_k,
                base_top_k=base_top_k,
                reference=reference,
                levels=levels,
                substitute=substitute,
                row_means=row_means,
                teacher_targets=teacher_targets,
            ),
        )
        return loss

    return register


def retain_objective(name: str, *, teacher_top_k: bool = False) -> Callable[[Loss], Loss]:
    """Register the decorated function as a retain objective; the arguments are those of `Objective`."""

    def register(loss: Loss) -> Loss:
        _add(RETAIN_OBJECTIVES, Objective(name, loss, teacher_top_k=teacher_top_k))
        return loss

    return register


def _add(registry: dict[str, Objective], objective: Objective) -> None:
    if objective.name in registry or objective.name == "none":
        raise ValueError(f"an objective called {objective.name!r} is registered already")
    registry[objective.name] = objective
