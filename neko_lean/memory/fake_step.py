"""One training step on fake tensors (shapes without storage), whose allocations are counted."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from neko_lean.errors import NekoLeanError
from neko_lean.memory.estimate import GRADIENTS, LAYER_INPUTS, LOGITS, UPDATE, tensor_bytes
from neko_lean.memory.fake_models import find_layers
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.memory.repeated_layers import Recordings, repeat_layers
from neko_lean.memory.shortened_models import ShortenedModel
from neko_lean.models import CHUNK_ELEMENTS, CausalLM, checkpoint_activations
from neko_lean.recipe import Recipe
from neko_lean.training import SLICE, LayerPass, MicroBatches, select_hidden, update_bytes


def fake_step(
    lm: CausalLM,
    recipe: Recipe,
    micro: MicroBatches,
    live: LiveTensors,
    recordings: Recordings,
    shortened: ShortenedModel,
) -> list[int]:
    """Make the allocations of one training step.

    Args:
        lm: model from `FakeModels.use`, to which the step adds hooks and gradients.
        recipe: its `backward` decides how the step runs.
        micro: micro-batches of the step.
        live: counter that is active; it is told what each storage is for, and about scratch memory of CPU kernels.
        recordings: of the model's layers.
        shortened: which layers of the whole model those of `lm` stand for.

    Returns the bytes of each layer input that the step keeps, if it keeps them apart from other activations.

    Raises CannotRepeatError if only the whole model tells the peak.
    """

    def update(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            live.label([parameter.grad], GRADIENTS)
            per_element = update_bytes(parameter.dtype, recipe.state_bits)
            live.temporary(per_element * min(SLICE, parameter.numel()), UPDATE)
            parameter.grad = None

    # Forward.
    layer_pass, hooks = None, []
    input_bytes: list[int] = []
    if recipe.backward == "layerwise":
        layers = find_layers(lm)
        repeat_layers(layers, live, recordings, holds_inputs=True)
        layer_pass = LayerPass(lm, layers)
        hidden = layer_pass.forward(micro)  # [N, d]
        for calls in layer_pass.calls:
            for number, call in enumerate(calls, layer_pass.first_trained):
                live.label([call.hidden], LAYER_INPUTS)
                input_bytes += [tensor_bytes([call.hidden])] * shortened.copies(number)
        del calls, call
    else:
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                hooks.append(parameter.register_post_accumulate_grad_hook(update))
        repeat_layers_if_possible(lm, live, recordings, checkpointed=recipe.backward == "checkpointed")
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
    for hook in hooks:
        hook.remove()
    return input_bytes


def repeat_layers_if_possible(lm: CausalLM, live: LiveTensors, recordings: Recordings, *, checkpointed: bool) -> None:
    """Checkpoint activations if asked to, and run each kind of layer once, unless layers pass on more than hidden
    states."""
    layers = None
    with suppress(NekoLeanError):
        layers = find_layers(lm)
    if checkpointed:
        checkpoint_activations(lm.model)
    if layers is not None:
        repeat_layers(layers, live, recordings, holds_inputs=False, checkpointed=checkpointed)


def chunk_bytes(lm: CausalLM, positions: int) -> int:
    """Bytes of the head's buffers for one chunk of at most `positions` positions."""
    return 4 * _chunk_buffers(lm) * min(CHUNK_ELEMENTS, positions * lm.head.shape[0])


def _chunk_buffers(lm: CausalLM) -> int:
    """Number of float32 buffers of a chunk's size: the logits, the student's tail, and the gradient of a soft cap."""
    return 2 if lm.softcap is None else 3
