"""Sections of bench/gpu.py that train: peak memory and time of a step, and the largest model in 24 GB."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import clock, olmo_config, padded
from gpu_setup import (
    OLMO_7B,
    TOY,
    RandomTeacher,
    Setup,
    Step,
    full_step,
    load_steps,
    parameter_count,
    random_lm,
)
from profile_step import known_peak, step_flops
from transformers import OlmoForCausalLM

from neko_lean.checkpoints import RunState
from neko_lean.errors import NekoLeanError, PartialStepError, first_line
from neko_lean.memory import CONTEXT, TwoModelBaseline, predict, predicted_peak, two_model_loss
from neko_lean.memory.estimate import WORKSPACES
from neko_lean.memory.largest_step import largest_step
from neko_lean.memory.two_models import predict_two_models
from neko_lean.models import CausalLM, peak_memory, reset_peak_memory
from neko_lean.models.causal_lm import checkpoint_activations
from neko_lean.models.memory_use import memory_in_use
from neko_lean.recipe import Recipe, load_recipe
from neko_lean.training.batch import Batch
from neko_lean.training.determinism import deterministic
from neko_lean.training.examples import TrainingExamples
from neko_lean.training.layers import decoder_layers
from neko_lean.training.optimizer import InBackwardAdam8bit
from neko_lean.training.trainer import StepIndices, Trainer

TIMED_STEPS = 6
LR = 1e-6  # so small that ascent on random weights stays finite
CARD = 24 * 2**30  # bytes of the card that the capped sections imitate
ATTEMPTS = 3  # models tried, each one layer smaller, if the predicted one does not fit


def train(setup: Setup, **changes: Any) -> dict[str, Any]:
    """Steps of recipe neko with these changes: on the given rows, timed; then on full rows, for their peak."""
    kernels = torch.device("cpu") if changes.pop("default_kernels", False) else None
    before = memory_in_use(setup.device)
    run = Run.of(random_lm(setup), load_steps(setup), full_step(setup), load_recipe("neko", changes), before, kernels)
    timed = run_steps(run, run.steps, 1 if setup.toy else TIMED_STEPS)
    full = run_steps(run, run.full, 1)
    return {**timed, "full": full}


@dataclass(frozen=True)
class Run:
    """A student in training."""

    trainer: Trainer
    optimizer: InBackwardAdam8bit
    steps: list[StepIndices]
    full: list[StepIndices]  # one step of full rows
    before: int  # bytes that were in use before the student existed
    kernels: torch.device  # device for `deterministic`

    @classmethod
    def of(
        cls,
        lm: CausalLM,
        steps: list[Step],
        full: Step,
        recipe: Recipe,
        before: int,
        kernels: torch.device | None = None,
    ) -> Run:
        """Prepare the student as `unlearn` does; `kernels` replaces its choice between deterministic and other ones."""
        every = [*steps, full]
        examples = TrainingExamples([e for step in every for e in step[0]], [e for step in every for e in step[1]])
        trainer = Trainer(lm, 1, examples, RandomTeacher(len(lm.head)), recipe)
        trainer.train_mode()
        optimizer = trainer.new_optimizer(0)
        if trainer.layer_pass is None:
            optimizer.attach()
        n = len(full[0])
        indices: list[StepIndices] = [(range(i * n, i * n + n), range(i * n, i * n + n)) for i in range(len(every))]
        return cls(trainer, optimizer, indices[:-1], indices[-1:], before, kernels or trainer.deterministic_on)


def run_steps(run: Run, steps: list[StepIndices], timed: int) -> dict[str, Any]:
    """Take two steps to warm up and `timed` ones; `steps` take turns. Times include the update."""
    trainer, device = run.trainer, run.trainer.student.device
    trainer.load_state(RunState(trainer.recipe.micro_tokens, trainer.state.head_chunk))
    seconds, tokens = [], []
    reset_peak_memory(device)
    with deterministic(run.kernels):
        for number in range(2 + timed):
            indices = steps[number % len(steps)]
            batch = trainer.batch(indices)
            start = clock(device)
            batch = take_step(run, indices, batch)
            seconds.append(clock(device) - start)
            tokens.append(batch.tokens)

    lm, state = trainer.student, trainer.state
    return {
        "parameters": parameter_count(lm),
        "weights": sum(p.numel() * p.element_size() for p in lm.model.parameters()),
        "state": run.optimizer.state_bytes(),
        "peak": peak_memory(device, run.before),
        "reserved": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "predicted": predicted_peak(lm.model.config, trainer.recipe, state.largest, state.wanted, device),
        "first_step_seconds": seconds[0],
        "seconds": statistics.median(seconds[2:]),
        "all_seconds": seconds,
        "tokens": batch.tokens,
        "tokens_per_second": statistics.median(t / s for t, s in zip(tokens[2:], seconds[2:], strict=True)),
        "micro_batches": len(batch.sizes),
        **utilisation(run, indices, batch, seconds[-1]),
        "backward": trainer.recipe.backward,
        "packed": trainer.packed,
        "micro_tokens": trainer.recipe.micro_tokens,
        "head_chunk": state.head_chunk,
    }


def utilisation(run: Run, indices: StepIndices, batch: Batch, seconds: float) -> dict[str, float | None]:
    """Model FLOPs of a step (see profile_step.py), and their share of the card's peak; None for an unknown card."""
    trainer = run.trainer
    if is_quantized(trainer.recipe):  # step_flops counts plain linear layers only
        return {"flops": None, "mfu": None}
    sets = (trainer.examples.forget, trainer.examples.retain)
    lengths = [len(examples[i]) for examples, chosen in zip(sets, indices, strict=True) for i in chosen]
    layers = trainer.layer_pass.layers if trainer.layer_pass else decoder_layers(trainer.student)
    flops, peak = step_flops(trainer.student, layers, batch, lengths)["model"], known_peak(trainer.student.device)
    return {"flops": flops, "mfu": flops / seconds / peak if peak else None}


def take_step(run: Run, indices: StepIndices, batch: Batch) -> Batch:
    """One step. As in training, it is retried in smaller pieces if memory runs out; weights are not restored."""
    while True:
        with suppress(PartialStepError):
            return run.trainer.step(run.optimizer, LR, indices, batch)[0]
        batch = run.trainer.batch(indices)


def train_two_models(setup: Setup, baseline: TwoModelBaseline) -> dict[str, Any]:
    """Steps with a live teacher and torch's AdamW, on the same rows."""
    device, before = setup.device, memory_in_use(setup.device)
    student = random_lm(setup, dtype=baseline.dtype).model.train()
    teacher = random_lm(setup, dtype=baseline.dtype, seed=1).model.eval()
    if baseline.checkpointing:
        checkpoint_activations(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)

    def step(examples: Step) -> None:
        batches = [padded([example.input_ids for example in split], baseline, device) for split in examples]
        two_model_loss(student, teacher, *batches, 0.2).backward()
        optimizer.step()
        optimizer.zero_grad()

    steps, seconds, speeds = load_steps(setup), [], []
    reset_peak_memory(device)
    for number in range(2 + (1 if setup.toy else TIMED_STEPS)):
        examples = steps[number % len(steps)]
        start = clock(device)
        step(examples)
        seconds.append(clock(device) - start)
        speeds.append(sum(map(len, [*examples[0], *examples[1]])) / seconds[-1])
    config = olmo_config(setup.sizes)
    predicted = predict_two_models(config, baseline, setup.rows_per_set, setup.max_length)  # type: ignore[arg-type]
    return {
        "peak": peak_memory(device, before),
        "predicted": predicted.peak + (WORKSPACES if device.type == "cuda" else 0),
        "seconds": statistics.median(seconds[2:]),
        "all_seconds": seconds,
        "tokens_per_second": statistics.median(speeds[2:]),
    }


def largest_in_24_gb(setup: Setup, **changes: Any) -> dict[str, Any]:
    """The most layers of OLMo-7B's width that train on full rows with the allocator capped as on a 24 GB card."""
    recipe, limit = load_recipe("neko", changes), cap_allocator(setup)
    sizes = TOY if setup.toy else OLMO_7B
    layers, limited_by = most_layers(sizes, recipe, limit, setup)
    reason = ""
    for count in range(layers, max(0, layers - ATTEMPTS), -1):
        try:
            outcome = one_size(setup, {**sizes, "num_hidden_layers": count}, recipe)
            return {
                **outcome,
                "layers": count,
                "predicted_layers": layers,
                "limit": limit,
                "limited_by": limited_by,
            }
        except (torch.OutOfMemoryError, NekoLeanError) as error:
            reason = first_line(error)
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    raise NekoLeanError(f"{layers} layers are predicted to fit, but {count} do not: {reason}")


def one_size(setup: Setup, sizes: dict[str, int], recipe: Recipe) -> dict[str, Any]:
    """Steps on full rows of a model of this shape. In a function, so that its tensors are freed if it fails."""
    before = memory_in_use(setup.device)
    run = Run.of(make_student(setup, sizes, recipe), [], full_step(setup), recipe, before)
    return {**run_steps(run, run.full, 1), "parameters": olmo_parameters(sizes)}


def make_student(setup: Setup, sizes: dict[str, int], recipe: Recipe) -> CausalLM:
    """A random model as the recipe trains it: with adapters on a quantised base, if it says so."""
    if not is_quantized(recipe):
        return random_lm(setup, sizes)
    from neko_lean.training import prepare_student  # only versions with `quantize_base` have it

    # Plain weights are quantised on their way from host memory, where all layers can share those of one.
    host = dataclasses.replace(setup, device=torch.device("cpu"))
    lm = random_lm(host, {**sizes, "num_hidden_layers": 1})
    layers = lm.backbone.layers
    for number in range(1, sizes["num_hidden_layers"]):
        with torch.device("meta"):
            layer = type(layers[0])(lm.model.config, number)
        layer.load_state_dict(layers[0].state_dict(), assign=True)
        layers.append(layer.eval())
    lm.model.config.num_hidden_layers = len(layers)
    prepare_student(lm, recipe, setup.device)
    return lm


def is_quantized(recipe: Recipe) -> bool:
    return getattr(recipe, "quantize_base", "none") != "none"


def cap_allocator(setup: Setup) -> int:
    """Limit PyTorch's allocator to what a 24 GB card leaves it; return that limit in bytes."""
    limit = CARD - CONTEXT
    if setup.device.type == "cuda":
        total = torch.cuda.get_device_properties(setup.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    return limit


def most_layers(sizes: dict[str, int], recipe: Recipe, limit: int, setup: Setup) -> tuple[int, str]:
    """Layers with which the predicted peak and what is on the host fit, and which of the two limits them.

    Both grow by the same amount per layer.
    """
    if setup.toy:
        return sizes["num_hidden_layers"], "the toy size"

    def peaks(count: int) -> tuple[int, int]:
        config = olmo_config({**sizes, "num_hidden_layers": count})
        estimate = predict(config, recipe, largest_step(recipe))
        return estimate.peak_on(setup.device), estimate.host

    host = 0.8 * available_host_memory()
    (low, low_host), (high, high_host) = peaks(8), peaks(12)
    on_device = 8 + int((limit - low) / ((high - low) / 4))
    on_host = 8 + int((host - low_host) / ((high_host - low_host) / 4)) if high_host > low_host else on_device
    return max(1, min(on_device, on_host)), "the card" if on_device <= on_host else "host memory"


def olmo_parameters(sizes: dict[str, int]) -> int:
    """Parameters of a model of this shape."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in OlmoForCausalLM(olmo_config(sizes)).parameters())


def available_host_memory() -> int:
    """Bytes that the machine can still give, from /proc/meminfo."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024


def qlora_in_24_gb(setup: Setup) -> dict[str, Any]:
    """As `largest_in_24_gb`, for adapters on an nf4 base."""
    return largest_in_24_gb(setup, lora_rank=16, quantize_base="nf4")
