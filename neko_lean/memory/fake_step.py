"""One training step on fake tensors (shapes without storage), whose allocations are counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neko_lean.errors import NekoLeanError
from neko_lean.memory.estimate import GRADIENTS, LAYER_INPUTS, LOGITS, UPDATE, tensor_bytes
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.memory.repeated_layers import each_kind_once, repeat_layers
from neko_lean.models import (
    CHUNK_ELEMENTS,
    CausalLM,
    checkpoint_activations,
    config_softcap,
    find_backbone,
    load_config,
    reset_output_switches,
)
from neko_lean.recipe import Recipe
from neko_lean.training import SLICE, LayerPass, MicroBatches, decoder_layers, select_hidden, update_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within this context, new tensors have no storage.

    PyTorch logs each operator that fake tensors do not support before it raises. That log is silenced, because the
    exception is handled by the caller.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with FakeTensorMode():
            yield
    finally:
        logger.setLevel(level)


def fake_model(config: Path | PreTrainedConfig, dtype: torch.dtype) -> CausalLM:
    """A model without storage. Call it within `fake_tensors()`.

    Args:
        config: the model's config, or a folder that holds its config.json.
        dtype: dtype of the weights.

    Raises NekoLeanError if the model's backbone and head cannot be told apart.
    """
    from transformers import AutoModelForCausalLM

    model_config = load_config(config) if isinstance(config, Path) else config
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False).eval()
    reset_output_switches(model)
    try:
        with each_kind_once(model):
            backbone = find_backbone(model)
    except NekoLeanError as error:
        raise NekoLeanError(f"memory cannot be predicted from the config alone in {dtype}: {error}") from error
    return CausalLM(model, backbone, softcap=config_softcap(model_config))


def find_layers(lm: CausalLM) -> nn.ModuleList:
    """The model's decoder layers, as `decoder_layers` finds them. Raises NekoLeanError if they cannot be run alone."""
    with each_kind_once(lm.model):
        return decoder_layers(lm)


def fake_step(lm: CausalLM, recipe: Recipe, micro: MicroBatches, live: LiveTensors) -> list[int]:
    """Make the allocations of one training step.

    Args:
        lm: model from `fake_model`.
        recipe: its `backward` decides how the step runs.
        micro: micro-batches of the step.
        live: counter that is active; it is told what each storage is for, and about scratch memory of CPU kernels.

    Returns the bytes of each layer input that the step keeps, if it keeps them apart from other activations.
    """

    def update(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            live.label([parameter.grad], GRADIENTS)
            with live.of_kind(UPDATE):
                per_element = update_bytes(parameter.dtype, recipe.state_bits)
                torch.empty(per_element * min(SLICE, parameter.numel()), dtype=torch.uint8)
            parameter.grad = None

    # Forward.
    layer_pass = None
    input_bytes: list[int] = []
    if recipe.backward == "layerwise":
        layers = find_layers(lm)
        repeat_layers(layers, live, holds_inputs=True)
        layer_pass = LayerPass(lm, layers)
        hidden = layer_pass.forward(micro)  # [N, d]
        for call in chain.from_iterable(layer_pass.calls):
            live.label([call.hidden], LAYER_INPUTS)
            input_bytes.append(tensor_bytes([call.hidden]))
        del call
    else:
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(update)
        repeat_layers_if_possible(lm, live, checkpointed=recipe.backward == "checkpointed")
        hidden = select_hidden(lm, micro)  # [N, d]

    # Loss: `token_stats` looks at values, which fake tensors lack, so its buffers and gradients stand in for it.
    head = lm.model.get_output_embeddings().weight
    hidden_grad = torch.empty_like(hidden)
    if head.requires_grad:
        with live.of_kind(GRADIENTS):
            head.grad = torch.empty_like(head)
        if head.dtype == torch.bfloat16:
            # The last chunk's product adds to the head's gradient while its logits and their gradient are alive.
            with live.of_kind(LOGITS):
                alive = torch.empty(chunk_bytes(lm, len(hidden)) * 6 // (4 * _chunk_buffers(lm)), dtype=torch.uint8)
            live.scratch(4 * head.numel())
            del alive
    with live.of_kind(LOGITS):
        logits = chunk_bytes(lm, len(hidden)) // _chunk_buffers(lm)
        buffers = [torch.empty(logits, dtype=torch.uint8) for _ in range(_chunk_buffers(lm))]
    del buffers
    if head is not lm.embedding and layer_pass is None:
        update(head)

    # Backward, with an update for each parameter whose gradient is complete.
    torch.autograd.backward(hidden, hidden_grad)
    del hidden, hidden_grad
    if layer_pass is not None:
        layer_pass.backward(update)
    return input_bytes


def repeat_layers_if_possible(lm: CausalLM, live: LiveTensors, *, checkpointed: bool) -> None:
    """Checkpoint activations if asked to, and run each kind of layer once, unless layers pass on more than hidden
    states."""
    layers = None
    with suppress(NekoLeanError):
        layers = find_layers(lm)
    if checkpointed:
        checkpoint_activations(lm.model)
    if layers is not None:
        repeat_layers(layers, live, holds_inputs=False)


def chunk_bytes(lm: CausalLM, positions: int) -> int:
    """Bytes of the head's buffers for one chunk of at most `positions` positions."""
    return 4 * _chunk_buffers(lm) * min(CHUNK_ELEMENTS, positions * lm.head.shape[0])


def _chunk_buffers(lm: CausalLM) -> int:
    """Number of float32 buffers of a chunk's size: the logits, the student's tail, and the gradient of a soft cap."""
    return 2 if lm.softcap is None else 3
