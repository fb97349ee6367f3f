"""A forward and backward pass that holds the gradients of one layer at a time, for any number of micro-batches.

The forward pass runs each micro-batch without gradient and stores the input of each layer. The backward pass goes from
the last layer to the first, as in L2L (arXiv 2002.05645): it runs a layer again, with gradient, for all micro-batches,
after which the layer's parameters can be updated and their gradients freed (LOMO, arXiv 2306.09782).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neko_lean.models import CausalLM, ShardedModel
from neko_lean.training.micro_batches import MicroBatches


@dataclass
class LayerCall:
    """The call of one layer on one micro-batch."""

    hidden: Tensor  # [b, l, d]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run_layer(self, layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Call `layer` with the same arguments but other hidden states. Returns its hidden states [b, l, d]."""
        return _hidden_states(layer(hidden, *self.args, **self.kwargs))


@dataclass
class LastOutput:
    """Output of the last layer for one micro-batch, cut to the positions that the loss needs."""

    leaf: Tensor  # [n, d], where the loss's gradient arrives
    positions: Tensor  # [n] int64 into the flattened b * l
    shape: torch.Size  # (b, l, d)

    def full_grad(self) -> Tensor:
        """The gradient at all positions [b, l, d]."""
        grad = self.leaf.new_zeros(self.shape)
        if self.leaf.grad is not None:
            grad.view(-1, self.shape[-1])[self.positions] = self.leaf.grad
        return grad


class LayerPass:
    """Forward and backward pass of a training step, layer by layer.

    It works for any architecture whose layers `decoder_layers` accepts, because hooks record what the model's own
    forward passes to each layer. What runs before the first layer (the embedding) and after the last one (the final
    norm) runs with gradient as part of that forward.

    The costs are those of gradient checkpointing: one additional forward pass, and one stored tensor per layer.

    Args:
        lm: the student.
        layers: its layers, from `decoder_layers`.
        offload: store the layers' inputs in host memory, pinned if they come from a GPU.
        shards: the student's shards, if it is sharded across ranks. Each rank runs its own micro-batches.
    """

    def __init__(
        self, lm: CausalLM, layers: nn.ModuleList, *, offload: bool = False, shards: ShardedModel | None = None
    ) -> None:
        self.lm, self.layers, self.offload, self.shards = lm, layers, offload, shards

        # Parameters by place. Recorded here because FSDP replaces parameters during a step.
        self.layer_parameters = [list(layer.parameters()) for layer in layers]
        in_layers = {id(parameter) for parameter in layers.parameters()}
        self.other_parameters = [p for p in lm.model.parameters() if id(p) not in in_layers]
        self.embedding = lm.embedding

        # Layers below this one are frozen, and so is everything before them.
        trained = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
        self.first_trained = next((number for number, flag in enumerate(trained) if flag), len(layers))

        # What the forward pass stores for the backward pass, for each micro-batch.
        self.calls: list[list[LayerCall]] = []  # one list per micro-batch, one call per layer
        self.embedding_edges: list[torch.autograd.graph.GradientEdge] = []  # autograd nodes of the first layer's inputs
        self.last_outputs: list[LastOutput] = []

    def forward(self, micro: MicroBatches) -> Tensor:
        """Compute the last hidden states at the selected positions of all micro-batches.

        Returns hidden states [N, d] with gradient, those of the first micro-batch first.
        """
        self.clear()
        if self.shards is not None:
            self.shards.unshard()

        hidden = []
        for ids, position_ids, positions in zip(micro.input_ids, micro.position_ids, micro.index, strict=True):
            with self._recording(positions):
                hidden.append(self.lm.hidden(ids, position_ids)[0])  # [n, d]

        if self.shards is not None:
            self.shards.unshard_head()
        return torch.cat(hidden)

    def clear(self) -> None:
        """Free what the forward pass stored, after a step that was given up."""
        self.calls.clear()
        self.embedding_edges.clear()
        self.last_outputs.clear()
        if self.shards is not None:
            self.shards.reset()

    def pending_grads(self) -> Iterator[tuple[str, Tensor]]:
        """Names and gradients that the loss's own `backward()` has produced, before any parameter is updated."""
        grads = [("the last layer's output", output.leaf.grad) for output in self.last_outputs]
        grads += [(name, parameter.grad) for name, parameter in self.lm.model.named_parameters()]
        return ((name, grad) for name, grad in grads if grad is not None)

    def backward(self, update: Callable[[nn.Parameter], object]) -> None:
        """Run the backward pass through the layers, after the loss's own `backward()`.

        Args:
            update: called for each parameter as soon as its gradient is complete; it has to free the gradient.
        """
        # Head and final norm. The gradient of a tied head is complete only with that of the embedding.
        embedding = self.lm.embedding
        if self.shards is not None:
            self.shards.reduce_scatter_grads(self.lm.model, skip=embedding)
            self.shards.reshard()  # the embedding's gradient does not need its weight
        for parameter in self.other_parameters:
            if parameter is not self.embedding:
                update(parameter)

        # Layers, from the last to the first that is trained.
        grads: list[Tensor | None] = [output.full_grad() for output in self.last_outputs]  # [b, l, d] per micro-batch
        self.last_outputs.clear()
        for number in range(len(self.layers) - 1, self.first_trained - 1, -1):
            self._backward_layer(number, grads)
            for parameter in self.layer_parameters[number]:
                update(parameter)
        self.calls.clear()

        # Embedding.
        for edge in self.embedding_edges:
            torch.autograd.backward(edge, grads.pop(0))
        self.embedding_edges.clear()
        if self.shards is not None:
            self.shards.reduce_scatter_grad(embedding, self.embedding)
            self.shards.reset()
        for parameter in self.other_parameters:
            update(parameter)

    def _backward_layer(self, number: int, grads: list[Tensor | None]) -> None:
        """Backward pass of one layer over all micro-batches.

        `grads` holds the gradient of the layer's output [b, l, d] for each micro-batch, and is replaced by that of its
        input.
        """
        layer = self.layers[number]
        with nullcontext() if self.shards is None else self.shards.unsharded_layer(layer):
            # For a sharded layer, `forward` skips the hooks that would gather its weights again.
            run = layer if self.shards is None else layer.forward
            for micro_batch, calls in enumerate(self.calls):
                call = calls.pop()
                leaf = call.hidden.to(self.lm.device, non_blocking=True).detach()
                leaf.requires_grad_(number > self.first_trained or bool(self.embedding_edges))
                with torch.enable_grad():
                    out = call.run_layer(run, leaf)
                torch.autograd.backward(out, grads[micro_batch])
                grads[micro_batch] = leaf.grad
                del call, out, leaf  # free them before the next micro-batch

    @contextmanager
    def _recording(self, positions: Tensor) -> Iterator[None]:
        """Record one micro-batch's forward pass of the model.

        Gradients are disabled from the first layer to the last. Each layer's call is stored, and only the hidden states
        at `positions` [n] continue after the last layer, as [1, n, d].
        """
        calls: list[LayerCall] = []
        self.calls.append(calls)

        def before_layer(number: int) -> Callable[..., Any]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                kwargs = dict(kwargs)
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if number == 0:
                    if hidden.requires_grad:
                        self.first_trained = 0
                        self.embedding_edges.append(torch.autograd.graph.get_gradient_edge(hidden))
                    hidden = hidden.detach()
                    torch.set_grad_enabled(False)
                if number >= self.first_trained:
                    calls.append(LayerCall(self._offloaded(hidden), args[1:], kwargs))
                return (hidden, *args[1:]), kwargs

            return hook

        def after_last_layer(_: nn.Module, __: Any, out: Any) -> Any:
            hidden = _hidden_states(out)
            torch.set_grad_enabled(True)
            leaf = hidden.reshape(-1, hidden.shape[-1])[positions]  # [n, d]
            leaf.requires_grad_(self.first_trained < len(self.layers))
            self.last_outputs.append(LastOutput(leaf, positions, hidden.shape))
            return leaf[None] if isinstance(out, Tensor) else (leaf[None], *out[1:])

        hooks = [
            layer.register_forward_pre_hook(before_layer(number), with_kwargs=True)
            for number, layer in enumerate(self.layers)
        ]
        hooks.append(self.layers[-1].register_forward_hook(after_last_layer))
        try:
            with torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _offloaded(self, hidden: Tensor) -> Tensor:
        """`hidden`, in host memory if activations are offloaded."""
        if not self.offload or not hidden.is_cuda:
            return hidden
        host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        return host.copy_(hidden, non_blocking=True)


def _hidden_states(out: Any) -> Tensor:
    """The hidden states in a layer's output, which is a tensor or a tuple that starts with them."""
    hidden: Tensor = out if isinstance(out, Tensor) else out[0]
    return hidden
