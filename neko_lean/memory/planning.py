"""`neko-lean plan` as a function: what memory a recipe needs, where, and the options with which it fits a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neko_lean.errors import NekoLeanError, first_line
from neko_lean.memory.cache_size import cache_size
from neko_lean.memory.estimate import CONTEXT, MemoryEstimate, StepMemory
from neko_lean.memory.fake_models import FakeModels
from neko_lean.memory.largest_step import first_rank_share, largest_step
from neko_lean.memory.prediction import step_memory
from neko_lean.memory.step_time import ASSUMED_SHARE, GPUS, step_flops, step_seconds
from neko_lean.memory.two_models import TWO_MODEL_BASELINES, predict_two_models
from neko_lean.models import Model, accepts_loaded_model, model_folder, model_name, usable_length
from neko_lean.recipe import DEFAULT, Recipe, forgets, load_recipe
from neko_lean.terminal import progress_bar

SMALL_MICRO_TOKENS = 512  # tried for micro_tokens if larger micro-batches do not fit

# What to offload, cheapest first: the optimizer's state, the layers' inputs.
OFFLOADED = ((False, False), (False, True), (True, False), (True, True))

# What `plan` compares a full fine-tune with, from the most parameters that are trained to the smallest base.
ADAPTERS: tuple[dict[str, Any], ...] = (
    {"lora_rank": 64},
    {"lora_rank": 16},
    {"lora_rank": 16, "quantize_base": "int8"},
    {"lora_rank": 16, "quantize_base": "nf4"},
)


@accepts_loaded_model
def plan(
    model: Model,
    *,
    recipe: str | Path = DEFAULT,
    overrides: Mapping[str, Any] | None = None,
    gpu: str | int | None = None,
    gpus: int = 1,
    quiet: bool = True,
) -> dict[str, Any]:
    """Predict the memory of a recipe's largest step.

    Args:
        model: checkpoint folder, hub name or loaded model; only its config is read.
        recipe: name of a shipped recipe, or a .toml file.
        overrides: recipe values to replace, by key.
        gpu: memory of a GPU that the run has to fit: a size such as "8GB", a card such as "RTX 4090", or bytes.
        gpus: number of GPUs that share the student.
        quiet: show no progress.

    Returns:
        - `title`, and in `ways` the estimate for neko-lean (on each GPU) and for each two-model baseline, as in
          `MemoryEstimate.as_json`, in bytes;
        - `gpus` and `backward` that the plan is for, and in `fallback` a sentence if they are not what was asked for;
        - `step`: rows, tokens and FLOPs on each GPU, and rough seconds on several cards;
        - `cache`: size of the teacher cache on disk, or None if the recipe reads none;
        - with `gpu`, the cheapest `options` with which the run fits (flags of `unlearn`, or `--set` for a recipe
          of `memorize`; None if it does not fit at all), in `fits` the estimate with these options, and in `reason` why
          no options make it fit. Weights are trained if they can be, then adapters, then those of a quantised base;
        - with `gpu`, in `comparison` the same for a full fine-tune and for adapters: `name`, `options` and the estimate
          `fits` with them, and the `estimate` without options. None if the recipe trains adapters itself, or PEFT is
          not installed.

    Raises NekoLeanError if the memory cannot be predicted, or `gpu` is neither a size nor a known card.

    Example::

        neko_lean.plan("allenai/OLMo-1B-0724-hf", gpu="8GB")["options"]
    """
    gpu_bytes = _gpu_bytes(gpu) if isinstance(gpu, str) else gpu
    folder = model_folder(model, config_only=True)
    chosen = load_recipe(recipe, overrides)
    chosen = dataclasses.replace(chosen, max_length=usable_length(folder, chosen.max_length))
    models = FakeModels.of(folder)
    has_peft = importlib.util.find_spec("peft") is not None
    adapters = ADAPTERS if gpu is not None and has_peft and not chosen.lora_rank else ()
    setups = 1 + len(TWO_MODEL_BASELINES) + len(adapters)
    with progress_bar("predicting", setups, "setups", quiet) as bar:
        return _plan(model_name(model), models, chosen, gpu_bytes, gpus, adapters, bar.advance)


def _plan(
    name: str,
    models: FakeModels,
    recipe: Recipe,
    gpu_bytes: int | None,
    gpus: int,
    adapters: Sequence[Mapping[str, Any]],
    advance: Callable[[], object],
) -> dict[str, Any]:
    recipe, gpus, memory, fallback = _memory_or_fallback(models, recipe, gpus)
    estimates = {"neko-lean": memory.estimate(recipe.offload_state, recipe.offload_activations)}
    advance()

    # Two models.
    micro = largest_step(recipe)
    length = micro[0][1]
    rows = sum(count for count, _ in micro)
    for baseline in TWO_MODEL_BASELINES:
        with suppress(Exception):  # some families cannot run on fake tensors in some dtypes, such as experts in float32
            estimates[baseline.name] = predict_two_models(models, baseline, max(1, rows // 2), length)
        advance()

    tokens = sum(count * length for count, length in first_rank_share(micro, gpus))
    flops = step_flops(memory.matmul, tokens, recipe)
    result: dict[str, Any] = {
        "title": f"{name}, recipe {recipe.name}: {rows} rows of {length} tokens a step",
        "ways": {name: estimate.as_json() for name, estimate in estimates.items()},
        "gpus": gpus,
        "backward": recipe.backward,
        "fallback": fallback,
        "step": {
            "rows": rows,
            "tokens": tokens,
            "flops": flops,
            "assumed_share": ASSUMED_SHARE,
            "seconds": {gpu.name: step_seconds(flops, gpu) for gpu in GPUS},
        },
        "cache": cache_size(recipe, models.config),
    }
    if gpu_bytes is not None:
        full = Setup("full fine-tune", estimates["neko-lean"])
        full.options, full.fits = _fitting_options(models, recipe, memory, gpu_bytes, gpus)
        setups = [full]
        for change in adapters:
            setups += _with_adapters(models, recipe, change, gpu_bytes, gpus)
            advance()
        best = next((setup for setup in setups if setup.options is not None), None)
        result |= {
            "options": best and best.options,
            "fits": best and best.fits and best.fits.as_json(),
            "reason": _reason(models, memory, recipe, gpu_bytes, gpus) if best is None else None,
            "comparison": [setup.as_json() for setup in setups] if len(setups) > 1 else None,
        }
    return result


@dataclass
class Setup:
    """One line of the comparison between a full fine-tune and adapters."""

    name: str
    """What is trained, as options."""

    estimate: MemoryEstimate
    """Without options that save memory."""

    options: list[str] | None = None
    """The cheapest options with which it fits the GPU; None if there are none."""

    fits: MemoryEstimate | None = None
    """With these options."""

    def as_json(self) -> dict[str, Any]:
        """All values by name."""
        return {
            "name": self.name,
            "estimate": self.estimate.as_json(),
            "options": self.options,
            "fits": self.fits and self.fits.as_json(),
        }


def _with_adapters(
    models: FakeModels, recipe: Recipe, change: Mapping[str, Any], gpu_bytes: int, gpus: int
) -> list[Setup]:
    """A setup of ADAPTERS; none if the model does not allow it."""
    changed = dataclasses.replace(recipe, **change)
    if forgets(recipe):
        flags = [f"--{key.replace('_', '-')} {value}" for key, value in change.items()]
    else:  # `memorize` takes these as recipe values only
        flags = [f"--set {key}={value}" for key, value in change.items()]
    with suppress(NekoLeanError):
        memory = largest_step_memory(models, changed, gpus)
        setup = Setup(" ".join(flags), memory.estimate(recipe.offload_state, recipe.offload_activations))
        options, setup.fits = _offloading_options(models, changed, memory, gpu_bytes, gpus)
        setup.options = None if options is None else [*flags, *options]
        return [setup]
    return []


def _gpu_bytes(text: str) -> int:
    """Bytes of a size such as 8GB or 7.5 GiB, or of a card of GPUS."""
    for card in GPUS:
        if text.replace(" ", "").lower() == card.name.replace(" ", "").lower():
            return card.memory
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        names = ", ".join(card.name for card in GPUS)
        raise NekoLeanError(f"--gpu {text!r} is neither a size nor a known card; write it like 8GB, or one of {names}.")
    return int(float(match[1]) * 2**30)


def _memory_or_fallback(models: FakeModels, recipe: Recipe, gpus: int) -> tuple[Recipe, int, StepMemory, str | None]:
    """Memory of the largest step of a recipe. If the model's layers cannot be run one by one, that of the checkpointed
    backward pass, which training falls back to in a single process.

    Returns the recipe and the number of GPUs that are planned, the memory, and a sentence about the fallback.
    """
    try:
        return recipe, gpus, largest_step_memory(models, recipe, gpus), None
    except NekoLeanError as error:
        if recipe.backward != "layerwise":
            raise
        reason = str(error).removesuffix(".")
    changed = dataclasses.replace(recipe, backward="checkpointed", offload_activations=False)
    memory = largest_step_memory(models, changed, 1)
    fallback = (
        f"This model cannot be trained layer by layer, because {reason}. The plan is for backward=checkpointed, which "
        f"training falls back to: it keeps one layer's activations for all rows of a step at once."
    )
    if recipe.offload_activations:
        fallback += " Layer inputs are not offloaded then."
    if gpus > 1:
        fallback += f" It cannot be shared by {gpus} GPUs either, so the plan is for one GPU without torchrun."
    return changed, 1, memory, fallback


def largest_step_memory(models: FakeModels, recipe: Recipe, gpus: int) -> StepMemory:
    """Memory of a recipe's largest step on each GPU.

    Raises NekoLeanError if the model's own code does not run on fake tensors.
    """
    try:
        return step_memory(models, recipe, first_rank_share(largest_step(recipe), gpus), ranks=gpus)
    except NekoLeanError:
        raise
    except Exception as error:
        raise NekoLeanError(
            f"the memory of {models.config.name_or_path} cannot be predicted: its code needs real tensors "
            f"({first_line(error)})."
        ) from error


def _fitting_options(
    models: FakeModels, recipe: Recipe, memory: StepMemory, gpu_bytes: int, gpus: int
) -> tuple[list[str] | None, MemoryEstimate | None]:
    """The cheapest command-line options with which the largest step fits a GPU, and its estimate with them.

    `memory` is that of the largest step without changes. Returns None twice if no options make it fit.
    """
    options, fits = _offloading_options(models, recipe, memory, gpu_bytes, gpus)
    if options is not None or memory.weights + memory.gathered + CONTEXT > gpu_bytes:
        return options, fits

    # Train fewer layers, with everything else that saves memory.
    micro_tokens, layerwise = _small_micro_tokens(recipe), recipe.backward == "layerwise"
    changed = dataclasses.replace(recipe, micro_tokens=micro_tokens, offload_state=True, offload_activations=layerwise)
    last, fits = _largest_train_last(models, changed, gpu_bytes, gpus)
    if last is None:
        return None, None
    train_last = f"--train-last {last}" if forgets(recipe) else f"--set train_last={last}"
    flags = _offloading_flags(recipe, True, layerwise)
    return [*flags, *_micro_option(recipe, micro_tokens), train_last], fits


def _offloading_options(
    models: FakeModels, recipe: Recipe, memory: StepMemory, gpu_bytes: int, gpus: int
) -> tuple[list[str] | None, MemoryEstimate | None]:
    """`_fitting_options` among those that change nothing about what is trained."""
    if memory.weights + memory.gathered + CONTEXT > gpu_bytes:
        return None, None
    for micro_tokens in sorted({recipe.micro_tokens, _small_micro_tokens(recipe)}, reverse=True):
        if micro_tokens < recipe.micro_tokens:
            memory = largest_step_memory(models, dataclasses.replace(recipe, micro_tokens=micro_tokens), gpus)
        for state, activations in OFFLOADED:
            if activations and recipe.backward != "layerwise":  # only that backward pass keeps layer inputs apart
                continue
            estimate = memory.estimate(recipe.offload_state or state, recipe.offload_activations or activations)
            if estimate.peak + CONTEXT <= gpu_bytes:
                return [*_offloading_flags(recipe, state, activations), *_micro_option(recipe, micro_tokens)], estimate
    return None, None


def _small_micro_tokens(recipe: Recipe) -> int:
    return min(SMALL_MICRO_TOKENS, recipe.micro_tokens) if recipe.backward == "layerwise" else recipe.micro_tokens


def _micro_option(recipe: Recipe, micro_tokens: int) -> list[str]:
    return [f"--set micro_tokens={micro_tokens}"] if micro_tokens < recipe.micro_tokens else []


def _offloading_flags(recipe: Recipe, state: bool, activations: bool) -> list[str]:
    """Options that offload the optimizer's state, the layers' inputs, or both."""
    flag = "--offload-{}" if forgets(recipe) else "--set offload_{}=true"  # memorize has no --offload options
    offloaded = {"state": state, "activations": activations}
    return [flag.format(name) for name, wanted in offloaded.items() if wanted]


def _largest_train_last(
    models: FakeModels, recipe: Recipe, gpu_bytes: int, gpus: int
) -> tuple[int | None, MemoryEstimate | None]:
    """The largest `train_last` with which a recipe fits a GPU, and its estimate; None twice if none fits."""

    def estimate(last: int) -> MemoryEstimate | None:
        memory = largest_step_memory(models, dataclasses.replace(recipe, train_last=last), gpus)
        found = memory.estimate(recipe.offload_state, recipe.offload_activations)
        return found if found.peak + CONTEXT <= gpu_bytes else None

    layers = getattr(models.config, "num_hidden_layers", 0)
    fits, best, too_many = None, None, recipe.train_last or layers
    with suppress(NekoLeanError):  # a family without a list of layers has no last layers
        low = 1
        while low < too_many:
            middle = low if best is None else (low + too_many) // 2
            found = estimate(middle)
            if found is None:
                too_many = middle
            else:
                fits, best, low = found, middle, middle + 1
    return best, fits


def _reason(models: FakeModels, memory: StepMemory, recipe: Recipe, gpu_bytes: int, gpus: int) -> str:
    """Why no options make a run fit, in one sentence."""
    room, needed = gpu_bytes - CONTEXT, memory.weights + memory.gathered
    if needed > room:
        what = "weights alone" if not memory.gathered else "a rank's weights and what it gathers"
        return (
            f"{recipe.dtype} {what} are {needed / 2**30:.2f} GiB, but only {max(0, room) / 2**30:.2f} GiB are free "
            f"once CUDA has taken {CONTEXT / 2**30:.2f} GiB: no option of a fine-tune makes it fit; use a smaller "
            f"model or more GPU memory."
        )
    smallest = _smallest_peak(models, memory, recipe, gpus)
    return (
        f"{recipe.dtype} weights are {memory.weights / 2**30:.2f} GiB, and even with all options of a fine-tune a step "
        f"peaks at {smallest / 2**30:.2f} GiB, but only {room / 2**30:.2f} GiB are free once CUDA has taken "
        f"{CONTEXT / 2**30:.2f} GiB; lower max_length (--set max_length=N) or use more GPU memory."
    )


def _smallest_peak(models: FakeModels, memory: StepMemory, recipe: Recipe, gpus: int) -> int:
    """The smallest peak that the options which `plan` tries can reach; `memory` is that of the unchanged recipe."""
    layerwise = recipe.backward == "layerwise"
    peaks = [memory.estimate(True, layerwise).peak]
    smaller = _small_micro_tokens(recipe)
    for train_last in (recipe.train_last, 1):
        changed = dataclasses.replace(recipe, micro_tokens=smaller, train_last=train_last)
        with suppress(NekoLeanError):  # a family without a list of layers has no last layers
            peaks.append(largest_step_memory(models, changed, gpus).estimate(True, layerwise).peak)
    return min(peaks)
