"""Predict a run's peak memory before it starts.

The prediction runs the code of a training step on fake tensors and counts what is alive. It therefore needs a config
but no weights, knows no architecture, and cannot drift from the training code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from neko_lean.distributed import world_size
from neko_lean.memory.estimate import (
    ADAM_STATE,
    FIRST_USE,
    GATHERED,
    STUDENT,
    TRANSIENT,
    MemoryEstimate,
    StepMemory,
    tensor_bytes,
)
from neko_lean.memory.fake_step import chunk_bytes, fake_model, fake_step, fake_tensors
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.models import CausalLM
from neko_lean.recipe import Recipe
from neko_lean.training import MicroBatches, decoder_layers, freeze, state_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def predict(
    config: Path | PreTrainedConfig,
    recipe: Recipe,
    micro: Sequence[tuple[int, int]],
    head_positions: Sequence[int] | None = None,
    ranks: int = 1,
) -> MemoryEstimate:
    """Memory that one training step needs; with several `ranks`, memory of one rank.

    Args:
        config: the model's config, or a folder that holds its config.json. No weights are read.
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
    config: Path | PreTrainedConfig,
    recipe: Recipe,
    micro: Sequence[tuple[int, int]],
    head_positions: Sequence[int] | None = None,
    ranks: int = 1,
) -> StepMemory:
    """Memory of one step with everything on the device. The arguments are those of `predict`."""
    positions = list(head_positions or [rows * length for rows, length in micro])

    # Run the step.
    with fake_tensors():
        lm = fake_model(config, getattr(torch, recipe.dtype))
        freeze(lm, recipe.train_last, recipe.train_only)
        ids = [torch.zeros(shape, dtype=torch.int64) for shape in micro]  # [b, l] each
        index = [torch.zeros(count, dtype=torch.int64) for count in positions]  # [n] each
        with LiveTensors() as live:
            layer_inputs = fake_step(lm, recipe, MicroBatches(ids, [None] * len(ids), index), live)
        gathered = _gathered_bytes(lm) if ranks > 1 else 0

    # Name what it held.
    trainable = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    lines = {
        STUDENT: tensor_bytes(lm.model.parameters()) // ranks,
        "teacher weights": 0,
        ADAM_STATE: sum(state_size(parameter.numel(), recipe.state_bits) for parameter in trainable) // ranks,
        **({GATHERED: gathered} if ranks > 1 else {}),
        "gradients, the largest alone": max(tensor_bytes([parameter]) for parameter in trainable),
        "layer inputs": layer_inputs,
        "logits of a chunk": chunk_bytes(lm, sum(positions)),
        TRANSIENT: live.peak,
    }

    # Of the inputs in host memory, one is used on the device while the next one arrives.
    widest = max(rows * length for rows, length in micro) * lm.head.shape[1] * lm.head.element_size()
    return StepMemory(lines, max(0, layer_inputs - 2 * widest), live.resident - live.peak + FIRST_USE)


def _gathered_bytes(lm: CausalLM) -> int:
    """Bytes that a rank has gathered from the others when it needs most.

    That is either embeddings, norm and head during the loss's backward pass, or a layer, which FSDP receives in one
    buffer and then copies into its parameters.
    """
    layers = [tensor_bytes(layer.parameters()) for layer in decoder_layers(lm)]
    return max(tensor_bytes(lm.model.parameters()) - sum(layers), 2 * max(layers))
