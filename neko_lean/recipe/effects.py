"""Which keys of a recipe have an effect, given the others. A key that has none is refused instead of ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from neko_lean.errors import NekoLeanError
from neko_lean.objectives import FORGET_OBJECTIVES
from neko_lean.recipe.recipe import Recipe, forgets, reads_retain

UPPER_BOUNDS = ("forget_rows", "retain_rows", "eval_rows")  # a bound that is never reached is not an error

# When a key has an effect, and that requirement in words. Keys that are not listed always have one.
CONDITIONS: dict[str, tuple[Callable[[Recipe], bool], str]] = {
    "forget_weight": (lambda r: r.forget is not None, "a forget_objective"),
    "forget_reduction": (
        lambda r: r.forget is not None and not r.forget.row_means,
        "a forget_objective that is not a mean over examples by definition",
    ),
    "forget_span": (lambda r: r.forget is not None, "a forget_objective"),
    "answer_skip": (
        lambda r: r.forget is not None and r.forget_span != "all",
        "a forget_objective, and forget_span 'answers' or 'documents'",
    ),
    "forget_rows": (forgets, "a forget_objective or a substitute"),
    "retain_weight": (lambda r: r.retain is not None, "a retain_objective"),
    "retain_reduction": (lambda r: r.retain is not None, "a retain_objective"),
    "retain_rows": (lambda r: r.retain is not None, "a retain_objective"),
    "self_generated": (lambda r: forgets(r) and reads_retain(r), "a recipe that forgets and reads a retain set"),
    "chunk_rows": (lambda r: r.order == "chunks", "order 'chunks'"),
    "substitute_weight": (lambda r: r.substitute != "none", "a substitute"),
    "epochs": (lambda r: not r.max_steps or r.order == "chunks", "max_steps = 0, or order 'chunks'"),
    "lora_alpha": (lambda r: bool(r.lora_rank), "lora_rank > 0"),
    "lora_targets": (lambda r: bool(r.lora_rank), "lora_rank > 0"),
    "quantize_base": (lambda r: bool(r.lora_rank), "lora_rank > 0, because a quantised weight cannot be trained"),
    "schedule": (lambda r: r.stop == "steps", "stop 'steps'"),
    "eval_rows": (lambda r: bool(r.eval_every), "eval_every > 0"),
    "patience": (lambda r: bool(r.eval_every), "eval_every > 0"),
}


def hyperparameter_names() -> set[str]:
    """The hyperparameters of all forget objectives."""
    return {name for objective in FORGET_OBJECTIVES.values() for name in objective.hyperparameters}


def has_effect(key: str, recipe: Recipe) -> bool:
    """Whether another value of this key would change a run."""
    if key in hyperparameter_names():
        return key in recipe.hyperparameters
    return key not in CONDITIONS or CONDITIONS[key][0](recipe)


def refuse_without_effect(recipe: Recipe, given: Mapping[str, Any], *, in_file: bool) -> None:
    """Raise NekoLeanError for a key that the user gave but that has no effect on this recipe."""
    for key, value in given.items():
        if key in UPPER_BOUNDS or has_effect(key, recipe):
            continue
        if key == "forget_reduction" and recipe.forget is not None and value == "rows":
            continue  # what an objective that is a mean over examples does anyway
        if key == "epochs" and not in_file and given.get("max_steps"):
            continue  # both were given; max_steps decides
        fix = "remove it from the file" if in_file else "leave it out"
        raise NekoLeanError(
            f"recipe {recipe.name}: {key} = {value!r} has no effect; it requires {_requirement(key)}; {fix}, or "
            f"change that."
        )


def _requirement(key: str) -> str:
    if key in CONDITIONS:
        return CONDITIONS[key][1]
    owners = [name for name, objective in FORGET_OBJECTIVES.items() if key in objective.hyperparameters]
    return f"forget_objective {' or '.join(owners)}"
