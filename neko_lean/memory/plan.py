"""`neko-lean plan`: what a run needs, and what fits a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.errors import NekoLeanError, first_line
from neko_lean.memory.two_models import TWO_MODEL_BASELINES
from neko_lean.models import (
    model_folder,
    model_name,
    usable_length,
)
from neko_lean.recipes import Recipe, forgets, load_recipe

if TYPE_CHECKING:
    pass
from neko_lean.memory.prediction import CONTEXT, Need, _held, _need, _of_one, full_step
from neko_lean.memory.two_models import predict_two_models


def plan_run(
    model: str | Path, recipe: str | Path, overrides: Mapping[str, Any], card: int | None, gpus: int = 1
) -> dict[str, Any]:
    """The need of a recipe's largest step, for this tool (with several `gpus` that of each) and for two models, and
    which options fit a card of `card` bytes (`options`, flags of unlearn, or --set where the recipe is memorize's; None
    when not even all of them do)."""
    folder = model_folder(model, config_only=True)
    chosen = load_recipe(recipe, overrides)
    chosen = dataclasses.replace(chosen, max_length=usable_length(folder, chosen.max_length))
    try:
        held = _held_by_full_step(folder, chosen, gpus)
        note = ""
    except NekoLeanError as error:
        if gpus > 1 or chosen.backward != "layerwise":
            raise
        chosen = dataclasses.replace(chosen, backward="checkpointed", offload_activations=False)
        held = _held_by_full_step(folder, chosen, gpus)
        note = f" with backward=checkpointed, as {str(error).removesuffix('.')}"

    micro = full_step(chosen)
    length = micro[0][1]
    rows = sum(one[0] for one in micro)
    needs = {"neko-lean": _need(*held, chosen.offload_state, chosen.offload_activations)}
    for baseline in TWO_MODEL_BASELINES:
        with suppress(Exception):  # of the family's code in a dtype that it does not predict, as experts in float32
            needs[baseline.name] = predict_two_models(folder, baseline, max(1, rows // 2), length)
    found: dict[str, Any] = {
        "title": f"{model_name(model)}, recipe {chosen.name}: {rows} rows of {length} tokens a step, all used{note}",
        "ways": {name: dataclasses.asdict(need) for name, need in needs.items()},
    }
    if card is not None:
        options, fits = _fitting(folder, chosen, held, card, gpus)
        found |= {"options": options, "fits": fits and dataclasses.asdict(fits)}
    return found


def _held_by_full_step(folder: Path, recipe: Recipe, gpus: int) -> tuple[dict[str, int], int, int]:
    """`_held` of a recipe's largest step, on each of several GPUs. Raises NekoLeanError where the model's own code does
    not run on tensors without storage."""
    try:
        return _held(folder, recipe, _of_one(full_step(recipe), gpus), ranks=gpus)
    except NekoLeanError:
        raise
    except Exception as error:
        line = first_line(error)
        raise NekoLeanError(
            f"the memory of {folder} cannot be predicted: its code needs real tensors ({line})."
        ) from error


def _fitting(
    folder: Path, recipe: Recipe, held: tuple[dict[str, int], int, int], card: int, gpus: int
) -> tuple[list[str] | None, Need | None]:
    """The cheapest options, in flags, with which the recipe's largest step fits the card; and its need with them.
    `held` is what `_held` found for that step."""
    less = 512 if recipe.backward == "layerwise" else recipe.micro_tokens
    for positions in sorted({recipe.micro_tokens, min(less, recipe.micro_tokens)}, reverse=True):
        smaller = ["--set micro_tokens=512"] if positions < recipe.micro_tokens else []
        if smaller:
            changed = dataclasses.replace(recipe, micro_tokens=positions)
            held = _held_by_full_step(folder, changed, gpus)
        ways: list[list[str]] = [[], ["activations"], ["state"], ["state", "activations"]]
        if recipe.backward != "layerwise":  # no other keeps layer inputs apart
            ways = [[], ["state"]]
        for flags in ways:
            state, activations = (getattr(recipe, f"offload_{f}") or f in flags for f in ("state", "activations"))
            need = _need(*held, state, activations)
            if need.peak + CONTEXT <= card:
                flag = "--offload-{}" if forgets(recipe) else "--set offload_{}=true"  # memorize has no such flags
                return [flag.format(one) for one in flags] + smaller, need
    return None, None
