"""The decoder layers of a model: find them, choose which of them learn, and compile them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neko_lean.errors import NekoLeanError
from neko_lean.models import CausalLM


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
