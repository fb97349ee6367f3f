"""Check the values of a recipe: allowed choices, ranges, and combinations."""

from __future__ import annotations

import dataclasses
import re

from neko_lean.data import check_format_name
from neko_lean.errors import NekoLeanError
from neko_lean.objectives import FORGET_OBJECTIVES, REDUCTIONS, RETAIN_OBJECTIVES
from neko_lean.recipe.recipe import AUTO, Recipe, forgets, needs_teacher, trains_on_teacher, uses_levels

QUANTIZATIONS = ("nf4", "int8")
STEP_ORDERS = ("together", "alternating", "chunks")
SUBSTITUTES = ("none", "refusal", "random", "similar")
_POSITIVE = (
    "max_length",
    "forget_rows",
    "retain_rows",
    "self_generated",
    "batch_tokens",
    "micro_tokens",
    "eval_rows",
    "eps",
    "chunk_rows",
)


def check(recipe: Recipe) -> Recipe:
    """Return the recipe. Raises NekoLeanError naming the value that is wrong, what was expected, and what was found."""
    check_format_name(recipe.format)
    _check_choices(recipe)
    _check_ranges(recipe)
    _check_objectives(recipe)
    _check_training(recipe)
    _check_order(recipe)
    return recipe


def _check_choices(recipe: Recipe) -> None:
    choices = {
        "forget_objective": ("none", *FORGET_OBJECTIVES),
        "forget_reduction": REDUCTIONS,
        "retain_objective": ("none", *RETAIN_OBJECTIVES),
        "retain_reduction": REDUCTIONS,
        "schedule": ("linear", "constant"),
        "dtype": ("bfloat16", "float32"),
        "backward": ("layerwise", "checkpointed", "plain"),
        "quantize_base": ("none", *QUANTIZATIONS),
        "forget_span": ("answers", "all", "documents"),
        "substitute": SUBSTITUTES,
        "order": STEP_ORDERS,
        "choose": ("last", "loss", "quality"),
        "stop": ("steps", "forgotten"),
    }
    for key, allowed in choices.items():
        value = getattr(recipe, key)
        if value not in allowed:
            raise NekoLeanError(f"recipe {recipe.name}: {key} must be one of {', '.join(allowed)}, got {value!r}.")


def _check_ranges(recipe: Recipe) -> None:
    numbers = {
        field.name: (getattr(recipe, field.name), field.name in _POSITIVE)
        for field in dataclasses.fields(Recipe)
        if field.type in ("int", "float")
    }
    if recipe.forget is not None:
        for name, hyperparameter in recipe.forget.hyperparameters.items():
            numbers[name] = recipe.hyperparameters[name], hyperparameter.positive
    for key, (value, positive) in numbers.items():
        if not (value > 0 if positive else value >= 0):
            raise NekoLeanError(f"recipe {recipe.name}: {key} must be {'>' if positive else '>='} 0, got {value!r}.")
    if recipe.lr == AUTO:
        if not forgets(recipe):
            raise NekoLeanError(f"recipe {recipe.name}: lr 'auto' is made for unlearning; set a number.")
    elif isinstance(recipe.lr, str) or recipe.lr <= 0:
        raise NekoLeanError(f"recipe {recipe.name}: lr must be > 0, or 'auto', got {recipe.lr!r}.")
    for key in ("beta1", "beta2", "warmup"):
        if getattr(recipe, key) >= 1:
            raise NekoLeanError(f"recipe {recipe.name}: {key} must be < 1, got {getattr(recipe, key)!r}.")
    if recipe.state_bits not in (4, 8):
        raise NekoLeanError(f"recipe {recipe.name}: state_bits must be 8, or 4 with torchao, got {recipe.state_bits}.")


def _check_objectives(recipe: Recipe) -> None:
    forget = recipe.forget
    if forget is None and recipe.retain is None:
        raise NekoLeanError(f"recipe {recipe.name} has neither a forget_objective nor a retain_objective; set one.")
    if forget is not None and forget.substitute and recipe.substitute != forget.substitute:
        raise NekoLeanError(
            f"recipe {recipe.name}: forget_objective {forget.name} requires substitute {forget.substitute!r}, got "
            f"{recipe.substitute!r}."
        )
    if forget is not None and (forget.teacher_top_k or forget.base_top_k) and not trains_on_teacher(recipe):
        raise NekoLeanError(
            f"recipe {recipe.name}: forget_objective {forget.name} reads distributions from a cache; it requires "
            f"retain_objective kl or focal_kl, got {recipe.retain_objective!r}."
        )
    weighted = forget is not None and bool(forget.substitute)  # the objective itself uses the substitutes
    if (recipe.substitute == "none") != (not recipe.substitute_weight) and not weighted:
        raise NekoLeanError(
            f"recipe {recipe.name}: substitute and substitute_weight go together; set both or neither, got "
            f"{recipe.substitute!r} and {recipe.substitute_weight!r}."
        )
    if recipe.append_eos and needs_teacher(recipe):
        raise NekoLeanError(
            f"recipe {recipe.name}: append_eos = true does not work with a teacher cache, which contains no EOS after "
            f"answers; set append_eos = false."
        )


def _check_training(recipe: Recipe) -> None:
    if recipe.choose != "last" and not recipe.eval_every:
        raise NekoLeanError(f"recipe {recipe.name}: choose {recipe.choose!r} requires eval_every > 0.")
    if recipe.stop == "forgotten":
        _check_stop(recipe)
    try:
        re.compile(recipe.train_only)
    except re.error as error:
        raise NekoLeanError(
            f"recipe {recipe.name}: train_only must be a regular expression, got {recipe.train_only!r} ({error})."
        ) from error
    if recipe.dropout and recipe.backward == "layerwise":
        raise NekoLeanError(
            f"recipe {recipe.name}: dropout = true requires backward 'checkpointed' or 'plain', because 'layerwise' "
            f"runs each layer twice in a step."
        )
    if recipe.offload_activations and recipe.backward != "layerwise":
        raise NekoLeanError(
            f"recipe {recipe.name}: offload_activations = true requires backward 'layerwise', got {recipe.backward!r}."
        )
    if not recipe.max_steps and not recipe.epochs:
        raise NekoLeanError(f"recipe {recipe.name}: max_steps or epochs must be > 0; both are 0.")


def _check_order(recipe: Recipe) -> None:
    """Refuse an order of steps in which there would be no steps, or in which every second step would be empty."""
    if recipe.order == "chunks" and not forgets(recipe):
        raise NekoLeanError(
            f"recipe {recipe.name}: order 'chunks' splits the forget set into chunks, and neither an objective nor a "
            f"substitute uses the forget set; set order = 'together'."
        )
    if recipe.order == "chunks" and not recipe.epochs:
        raise NekoLeanError(
            f"recipe {recipe.name}: order 'chunks' trains each chunk for `epochs` epochs, so epochs must be > 0; "
            f"max_steps only limits the total."
        )
    if recipe.order == "alternating" and not (forgets(recipe) and recipe.retain is not None):
        unused = "retain" if forgets(recipe) else "forget"
        raise NekoLeanError(
            f"recipe {recipe.name}: order 'alternating' alternates forget and retain steps, and no objective uses the "
            f"{unused} set; set order = 'together'."
        )


def _check_stop(recipe: Recipe) -> None:
    if not uses_levels(recipe):
        raise NekoLeanError(
            f"recipe {recipe.name}: stop 'forgotten' requires a forget_objective with levels, such as calibrated, got "
            f"{recipe.forget_objective!r}."
        )
    if not recipe.eval_every:
        raise NekoLeanError(f"recipe {recipe.name}: stop 'forgotten' requires eval_every > 0.")
    if recipe.order == "chunks":
        raise NekoLeanError(f"recipe {recipe.name}: stop 'forgotten' does not work with order 'chunks'.")
    if recipe.patience:
        raise NekoLeanError(
            f"recipe {recipe.name}: stop 'forgotten' and patience exclude each other; set patience = 0."
        )
