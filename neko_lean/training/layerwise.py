"""One layer at a time over all micro-batches: any number of rows a step with one layer's gradients alive.

Forward runs each micro-batch without gradient and keeps the layers' inputs. Backward goes from the last layer to the
first; each layer is run again with gradient for every micro-batch, and is complete when all are through, so that its
parameters can be stepped and their gradients freed before the next layer begins. The cost is that of gradient
checkpointing. (L2L, arXiv 2002.05645, is the precedent; LOMO, arXiv 2306.09782, for stepping inside the backward.)

It knows no architecture: hooks catch what the model's own forward hands to each layer. What comes before the first
layer (embeddings) and after the last (the final norm) runs with gradient as part of that forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neko_lean.errors import NekoLeanError
from neko_lean.models import CausalLM, Shards
from neko_lean.training.micro_batches import MicroBatches


@dataclass
class _Call:
    """One layer's call on one micro-batch: its input [b, l, d] and all else that the model handed to it."""

    hidden: Tensor
    more: tuple[Any, ...]
    named: dict[str, Any]

    def run_layer(self, layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        return _first(layer(hidden, *self.more, **self.named))


def decoder_layers(lm: CausalLM) -> nn.ModuleList:
    """The model's layers, found to be such that one can be run again alone.

    Raises NekoLeanError where they are not: no list of layers that the forward pass walks through once and in order,
    or a layer that takes from another layer more than the hidden states.
    """
    family = type(lm.model).__name__
    layers = getattr(lm.backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise NekoLeanError(f"{family} has no list of decoder layers.")
    order: list[int] = []
    entangled = False

    def watch(number: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal entangled
            order.append(number)
            others = tree_leaves((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
            entangled |= any(isinstance(t, Tensor) and t.requires_grad for t in others)

        return before

    hooks = [layer.register_forward_pre_hook(watch(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        with torch.enable_grad():
            lm.hidden(torch.zeros(1, 2, dtype=torch.int64, device=lm.device))
    finally:
        for hook in hooks:
            hook.remove()
    if order != list(range(len(layers))) or entangled:
        raise NekoLeanError(f"the layers of {family} hand on more than their hidden states.")
    return layers


def compile_layers(layers: nn.ModuleList) -> None:
    """Have torch.compile make each layer's forward, for rows of any shape; what it makes for one layer serves all that
    are like it. Hooks stay outside.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


@torch.no_grad()
def _run_after(lm: CausalLM, layers: nn.ModuleList) -> list[nn.Module]:
    """The parts of the backbone that run after its last layer: the final norm, and in some families a projection."""
    inside = set(layers.modules())
    after: list[nn.Module] = []
    hooks = [layers[-1].register_forward_hook(lambda *_: after.clear())]
    for module in lm.backbone.modules():
        if module not in inside and not any(child in inside for child in module.modules()):
            hooks.append(module.register_forward_hook(lambda module, *_: after.append(module)))
    try:
        lm.hidden(torch.zeros(1, 2, dtype=torch.int64, device=lm.device))
    finally:
        for hook in hooks:
            hook.remove()
    return after


def freeze(lm: CausalLM, last: int = 0, only: str = "") -> None:
    """Choose what learns: with `last` above 0 the last so many layers, what follows them and an untied head; with
    `only`, a regular expression, of those the parameters in whose names it is found."""
    if last:
        layers = decoder_layers(lm)
        if last > len(layers):
            raise NekoLeanError(f"train_last is {last}, but the model has {len(layers)} layers.")
        following = _run_after(lm, layers)
        learns = [*layers[len(layers) - last :], *following]
        untied = lm.model.get_output_embeddings() if lm.head is not lm.embedding else None
        chosen = {p for module in (*learns, untied) if module is not None for p in module.parameters()}
        for parameter in lm.model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in chosen)
    if only:
        learning = False
        for name, parameter in lm.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and re.search(only, name) is not None)
            learning |= parameter.requires_grad
        if not learning:
            raise NekoLeanError(f"train_only {only!r} is found in the name of no parameter that learns.")


class LayerPass:
    """One step's forward and backward pass.

    Args:
        lm: the student.
        layers: what `decoder_layers` found in it.
        offload: keep the layers' inputs in host memory (pinned beside a GPU).
        shards: of the student, where it is spread over ranks; each then runs its own micro-batches.
    """

    def __init__(
        self, lm: CausalLM, layers: nn.ModuleList, *, offload: bool = False, shards: Shards | None = None
    ) -> None:
        self.lm, self.layers, self.offload, self.shards = lm, layers, offload, shards
        # As they are outside a step: within one, those of a model in shards are others.
        self.own = [list(layer.parameters()) for layer in layers]
        inside = {id(p) for p in layers.parameters()}
        self.outside = [p for p in lm.model.parameters() if id(p) not in inside]
        self.embedding = lm.embedding
        learns = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
        self.first = next((n for n, one in enumerate(learns) if one), len(layers))  # nothing below it learns
        self.calls: list[list[_Call]] = []  # [micro-batch][layer]
        self.embedded: list[torch.autograd.graph.GradientEdge] = []  # how the first layer's input came to be
        self.ends: list[tuple[Tensor, Tensor, torch.Size]] = []  # leaf [n, d], its positions [n], shape (b, l, d)

    def forward(self, micro: MicroBatches) -> Tensor:
        """Last hidden states [N, d] at the selected positions of all micro-batches, in order, with gradient."""
        self.clear()
        if self.shards is not None:
            self.shards.gather()
        rows = []
        for ids, wanted, place in zip(micro.input_ids, micro.index, micro.position_ids, strict=True):
            with self._caught(wanted):
                rows.append(self.lm.hidden(ids, place)[0])  # [n, d]
        if self.shards is not None:
            self.shards.gather_head()
        return torch.cat(rows)

    def clear(self) -> None:
        """Let go of what a step that was given up had kept."""
        for kept in (self.calls, self.embedded, self.ends):
            kept.clear()
        if self.shards is not None:
            self.shards.release()

    def pending_grads(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients that the loss's own `backward()` has left, with names: what can be looked at before anything is
        stepped."""
        found = [("the last layer's output", leaf.grad) for leaf, _, _ in self.ends]
        found += [(name, parameter.grad) for name, parameter in self.lm.model.named_parameters()]
        return ((name, gradient) for name, gradient in found if gradient is not None)

    def backward(self, complete: Callable[[nn.Parameter], object]) -> None:
        """Go back through the layers, once the loss's own `backward()` has reached the last layer's outputs.

        Calls `complete` for every parameter as soon as its gradient is; it has to free that gradient.
        """
        # A tied head's gradient is complete only with the embedding's.
        embedding = self.lm.embedding
        if self.shards is not None:
            self.shards.reduce(self.lm.model, leave=embedding)
            self.shards.reshard()  # the embedding's gradient can do without its weight
        for parameter in self.outside:
            if parameter is not self.embedding:
                complete(parameter)
        flowing: list[Tensor | None] = []  # gradient at the output of the layer to come, a micro-batch each [b, l, d]
        for leaf, wanted, shape in self.ends:
            grad = leaf.new_zeros(shape)
            if leaf.grad is not None:
                grad.view(-1, shape[-1])[wanted] = leaf.grad
            flowing.append(grad)
        self.ends.clear()
        for number in range(len(self.layers) - 1, self.first - 1, -1):
            layer = self.layers[number]
            with nullcontext() if self.shards is None else self.shards.whole_layer(layer):
                run = layer if self.shards is None else layer.forward  # without the hooks that would gather it again
                for m, calls in enumerate(self.calls):
                    call = calls.pop()
                    leaf = call.hidden.to(self.lm.device, non_blocking=True).detach()
                    leaf.requires_grad_(number > self.first or bool(self.embedded))
                    with torch.enable_grad():
                        out = call.run_layer(run, leaf)
                    torch.autograd.backward(out, flowing[m])
                    flowing[m] = leaf.grad
                    del call, out, leaf
            for parameter in self.own[number]:
                complete(parameter)
        self.calls.clear()
        for edge in self.embedded:
            torch.autograd.backward(edge, flowing.pop(0))
        self.embedded.clear()
        if self.shards is not None:
            self.shards.reduce_one(embedding, self.embedding)
            self.shards.release()
        for parameter in self.outside:
            complete(parameter)

    @contextmanager
    def _caught(self, wanted: Tensor) -> Iterator[None]:
        """While the model runs: gradient off from the first layer to the last, each layer's call kept, and only the
        wanted positions [n] let through behind the last, as [1, n, d]."""
        calls: list[_Call] = []
        self.calls.append(calls)

        def before(number: int) -> Callable[..., Any]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                named = dict(kwargs)
                hidden = args[0] if args else named.pop("hidden_states")
                if number == 0:
                    if hidden.requires_grad:
                        self.first = 0
                        self.embedded.append(torch.autograd.graph.get_gradient_edge(hidden))
                    hidden = hidden.detach()
                    torch.set_grad_enabled(False)
                if number >= self.first:
                    calls.append(_Call(self._kept(hidden), args[1:], named))
                return (hidden, *args[1:]), named

            return hook

        def after(_: nn.Module, __: Any, out: Any) -> Any:
            hidden = _first(out)
            torch.set_grad_enabled(True)
            leaf = hidden.reshape(-1, hidden.shape[-1])[wanted].requires_grad_(self.first < len(self.layers))
            self.ends.append((leaf, wanted, hidden.shape))
            return leaf[None] if isinstance(out, Tensor) else (leaf[None], *out[1:])

        hooks = [l_.register_forward_pre_hook(before(n), with_kwargs=True) for n, l_ in enumerate(self.layers)]
        hooks.append(self.layers[-1].register_forward_hook(after))
        try:
            with torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _kept(self, hidden: Tensor) -> Tensor:
        if not self.offload or not hidden.is_cuda:
            return hidden
        host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        return host.copy_(hidden, non_blocking=True)


def _first(out: Any) -> Tensor:
    """The hidden states of what a layer returns: a tensor, or a tuple that begins with them."""
    hidden: Tensor = out if isinstance(out, Tensor) else out[0]
    return hidden
