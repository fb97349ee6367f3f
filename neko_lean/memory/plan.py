"""`neko-lean plan` as a function: the memory a recipe needs, and the options with which it fits a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from neko_lean.errors import NekoLeanError, first_line
from neko_lean.memory.estimate import CONTEXT, MemoryEstimate, StepMemory
from neko_lean.memory.largest_step import first_rank_share, largest_step
from neko_lean.memory.prediction import step_memory
from neko_lean.memory.two_models import TWO_MODEL_BASELINES, predict_two_models
from neko_lean.models import model_folder, model_name, usable_length
from neko_lean.recipe import Recipe, forgets, load_recipe


def plan_run(
    model: str | Path,
    recipe_name: str | Path,
    overrides: Mapping[str, Any],
    gpu_bytes: int | None,
    gpus: int = 1,
) -> dict[str, Any]:
    """Predict the memory of a recipe's largest step.

    Args:
        model: checkpoint folder or hub name; only its config is read.
        recipe_name: name of a shipped recipe, or a .toml file.
        overrides: recipe values to replace, by key.
        gpu_bytes: memory of a GPU that the run has to fit, or None.
        gpus: number of GPUs that share the student.

    Returns:
        `title`, and in `ways` the estimate for neko-lean (on each GPU) and for each two-model baseline. With
        `gpu_bytes`, also the cheapest `options` with which the run fits (flags of `unlearn`, or `--set` for a recipe of
        `memorize`; None if it does not fit at all) and in `fits` the estimate with these options.

    Raises NekoLeanError if the memory cannot be predicted.
    """
    folder = model_folder(model, config_only=True)
    recipe = load_recipe(recipe_name, overrides)
    recipe = dataclasses.replace(recipe, max_length=usable_length(folder, recipe.max_length))

    # neko-lean: fall back to checkpointing for a model whose layers cannot be run one by one, as training does.
    note = ""
    try:
        memory = _largest_step_memory(folder, recipe, gpus)
    except NekoLeanError as error:
        if gpus > 1 or recipe.backward != "layerwise":
            raise
        recipe = dataclasses.replace(recipe, backward="checkpointed", offload_activations=False)
        memory = _largest_step_memory(folder, recipe, gpus)
        note = f" with backward=checkpointed, as {str(error).removesuffix('.')}"
    estimates = {"neko-lean": memory.estimate(recipe.offload_state, recipe.offload_activations)}

    # Two models.
    micro = largest_step(recipe)
    length = micro[0][1]
    rows = sum(count for count, _ in micro)
    for baseline in TWO_MODEL_BASELINES:
        with suppress(Exception):  # some families cannot run on fake tensors in some dtypes, such as experts in float32
            estimates[baseline.name] = predict_two_models(folder, baseline, max(1, rows // 2), length)

    plan: dict[str, Any] = {
        "title": f"{model_name(model)}, recipe {recipe.name}: {rows} rows of {length} tokens a step, all used{note}",
        "ways": {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()},
    }
    if gpu_bytes is not None:
        options, fits = _fitting_options(folder, recipe, memory, gpu_bytes, gpus)
        plan |= {"options": options, "fits": fits and dataclasses.asdict(fits)}
    return plan


def _largest_step_memory(folder: Path, recipe: Recipe, gpus: int) -> StepMemory:
    """Memory of a recipe's largest step on each GPU.

    Raises NekoLeanError if the model's own code does not run on fake tensors.
    """
    try:
        return step_memory(folder, recipe, first_rank_share(largest_step(recipe), gpus), ranks=gpus)
    except NekoLeanError:
        raise
    except Exception as error:
        raise NekoLeanError(
            f"the memory of {folder} cannot be predicted: its code needs real tensors ({first_line(error)})."
        ) from error


def _fitting_options(
    folder: Path, recipe: Recipe, memory: StepMemory, gpu_bytes: int, gpus: int
) -> tuple[list[str] | None, MemoryEstimate | None]:
    """The cheapest command-line options with which the largest step fits a GPU, and its estimate with them.

    `memory` is that of the largest step without changes. Returns None twice if no options make it fit.
    """
    layerwise = recipe.backward == "layerwise"
    smaller = min(512, recipe.micro_tokens) if layerwise else recipe.micro_tokens
    flag = "--offload-{}" if forgets(recipe) else "--set offload_{}=true"  # memorize has no --offload options
    combinations: list[list[str]] = [[], ["activations"], ["state"], ["state", "activations"]]
    if not layerwise:  # only the layerwise backward pass keeps layer inputs apart
        combinations = [[], ["state"]]

    for micro_tokens in sorted({recipe.micro_tokens, smaller}, reverse=True):
        micro_option = []
        if micro_tokens < recipe.micro_tokens:
            micro_option = [f"--set micro_tokens={micro_tokens}"]
            memory = _largest_step_memory(folder, dataclasses.replace(recipe, micro_tokens=micro_tokens), gpus)
        for offloaded in combinations:
            estimate = memory.estimate(
                recipe.offload_state or "state" in offloaded,
                recipe.offload_activations or "activations" in offloaded,
            )
            if estimate.peak + CONTEXT <= gpu_bytes:
                return [flag.format(name) for name in offloaded] + micro_option, estimate
    return None, None
