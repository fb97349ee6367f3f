"""Predict a run's peak memory before it starts.

The prediction runs the code of a training step on fake tensors and counts what is alive. It therefore needs a config
but no weights, knows no architecture, and cannot drift from the training code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from neko_lean.distributed import world_size
from neko_lean.memory.estimate import (
    FIRST_USE,
    LAYER_INPUTS,
    MemoryEstimate,
    StepMemory,
    pinned_bytes,
    tensor_bytes,
)
from neko_lean.memory.fake_models import FakeModels
from neko_lean.memory.fake_step import fake_step
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.memory.repeated_layers import Recordings, each_kind_once
from neko_lean.memory.shortened_models import Shorten, all_layers, run_shortened
from neko_lean.memory.step_time import MatmulParameters
from neko_lean.models import CausalLM, quantized_parameters
from neko_lean.recipe import Recipe
from neko_lean.training import MicroBatches, decoder_layers, freeze, new_state, prepare_student

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def predict(
    config: FakeModels | PreTrainedConfig | Path,
    recipe: Recipe,
    micro: Sequence[tuple[int, int]],
    head_positions: Sequence[int] | None = None,
    ranks: int = 1,
) -> MemoryEstimate:
    """Memory that one training step needs; with several `ranks`, memory of one rank.

    Args:
        config: the model's config, or a folder that holds its config.json. No weights are read. `FakeModels` make
            several predictions of one config cheaper.
        recipe: the run's recipe.
        micro: `(rows, length)` of each micro-batch of the step, on this rank.
        head_positions: number of positions of each micro-batch that reach the head; all of them by default.
        ranks: number of processes that share the student.

    Raises NekoLeanError if the recipe asks for `backward="layerwise"` and the model's layers cannot be run one by one.
    """
    memory = step_memory(config, recipe, micro, head_positions, ranks)
    return memory.estimate(recipe.offload_state, recipe.offload_activations)


def predicted_peak(
    config: PreTrainedConfig,
    recipe: Recipe,
    micro: Sequence[Sequence[int]],
    head_positions: Sequence[int],
    device: torch.device,
) -> int | None:
    """Peak bytes that `predict` gives for a step that a run has taken.

    Args:
        config, recipe, head_positions: as for `predict`.
        micro: `[rows, length]` of each micro-batch; empty if no step was taken.
        device: device that the run used.

    Returns None if no step was taken, or if the model's own code fails on fake tensors.
    """
    if not micro:
        return None
    try:
        shapes = [(rows, length) for rows, length in micro]
        return predict(config, recipe, shapes, head_positions, world_size()).peak_on(device)
    except Exception:  # raised by the model's own code; it must not cost a finished run
        return None


def step_memory(
    config: FakeModels | PreTrainedConfig | Path,
    recipe: Recipe,
    micro: Sequence[tuple[int, int]],
    head_positions: Sequence[int] | None = None,
    ranks: int = 1,
) -> StepMemory:
    """Memory of one step before the choice of what to offload. The arguments are those of `predict`.

    Steps of the same `FakeModels` share models and recordings, and a step that differs only in what it offloads is
    not run again.
    """
    models = FakeModels.of(config)
    positions = list(head_positions or [rows * length for rows, length in micro])
    step = dataclasses.replace(recipe, offload_state=False, offload_activations=False)
    key = repr(step), tuple(micro), tuple(positions), ranks
    if key not in models.memories:
        models.memories[key] = _run_step(models, step, micro, positions, ranks)
    return models.memories[key]


def _run_step(
    models: FakeModels, recipe: Recipe, micro: Sequence[tuple[int, int]], positions: Sequence[int], ranks: int
) -> StepMemory:
    """Memory of one step, from running it on fake tensors."""
    # Names of layers in a recipe are those of the whole model, and adapters are added to a shortened one.
    names_layers = bool(recipe.train_last or recipe.train_only or recipe.lora_targets != "auto")
    run = partial(_run_layers, models, recipe, micro, positions, ranks)
    return run(all_layers) if recipe.lora_rank and names_layers else run_shortened(run)


def _run_layers(
    models: FakeModels,
    recipe: Recipe,
    micro: Sequence[tuple[int, int]],
    positions: Sequence[int],
    ranks: int,
    shorten: Shorten,
) -> StepMemory:
    """`_run_step` with all layers of the model, or with some of them."""
    with models.use(getattr(torch, recipe.dtype)) as (lm, recordings):
        loaded = tensor_bytes(lm.model.parameters())
        if not recipe.lora_rank:
            with each_kind_once(lm.model):
                freeze(lm, recipe.train_last, recipe.train_only)
        with shorten(lm) as short:
            if recipe.lora_rank:
                prepare_student(lm, recipe, torch.device("cpu"))
                recordings = Recordings()  # no adapted layer has been recorded yet
            with each_kind_once(lm.model):
                if recipe.lora_rank:
                    freeze(lm, recipe.train_last, recipe.train_only)
                gathered = _gathered_bytes(lm) if ranks > 1 else 0
            ids = [torch.zeros(shape, dtype=torch.int64) for shape in micro]  # [b, l] each
            index = [torch.zeros(count, dtype=torch.int64) for count in positions]  # [n] each
            with LiveTensors(short.counts) as live:
                micro_batches = MicroBatches(ids, [None] * len(ids), index)
                input_bytes = fake_step(lm, recipe, micro_batches, live, recordings, short)
            parameters = short.parameters(lm)
            stored, quantized = tensor_bytes(parameters), quantized_parameters(lm.model)
            replicated = tensor_bytes(parameter for parameter in parameters if parameter in quantized)
            states = _state_bytes(parameters, recipe.state_bits, ranks)
            matmul = MatmulParameters.of(lm, short.missing)
        weights = (stored - replicated) // ranks + replicated

    # Name what it held. Of the inputs in host memory, one is used on the device while the next one arrives.
    return StepMemory(
        weights=weights,
        adam_state=sum(states),
        gathered=gathered,
        transient=live.peak_by_kind(),
        transient_without_inputs=live.peak_by_kind(leave_out=[LAYER_INPUTS]),
        inputs_in_transit=min(sum(input_bytes), 2 * max(input_bytes, default=0)),
        pinned_state=pinned_bytes(states),
        pinned_inputs=pinned_bytes(input_bytes),
        # On a CPU, quantising holds the loaded and the quantised model at once, before ranks shard it.
        cpu_peak=max(
            loaded + stored if recipe.quantize_base != "none" else 0,
            weights + sum(states) + gathered + live.resident,
        )
        + FIRST_USE,
        matmul=matmul,
    )


def _state_bytes(parameters: Iterable[nn.Parameter], bits: int, ranks: int) -> list[int]:
    """Bytes of each tensor of Adam's state of the trainable ones of some parameters on one rank.

    Call it within `fake_tensors()`.
    """
    sizes: dict[int, list[int]] = {}  # by number of elements
    states = []
    for parameter in parameters:
        if parameter.requires_grad:
            count = parameter.numel()
            if count not in sizes:
                state = new_state(count // ranks, count, bits, torch.device("cpu"))
                sizes[count] = [tensor_bytes([tensor]) for tensor in state.tensors().values()]
            states += sizes[count]
    return states


def _gathered_bytes(lm: CausalLM) -> int:
    """Bytes that a rank has gathered from the others when it needs most.

    That is either embeddings, norm and head during the loss's backward pass, or a layer, which FSDP receives in one
    buffer and then copies into its parameters.
    """
    quantized = quantized_parameters(lm.model)  # each rank has all of them

    def sharded_bytes(module: nn.Module) -> int:
        return tensor_bytes(parameter for parameter in module.parameters() if parameter not in quantized)

    layers = [sharded_bytes(layer) for layer in decoder_layers(lm)]
    return max(sharded_bytes(lm.model) - sum(layers), 2 * max(layers))
