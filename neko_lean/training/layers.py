"""The decoder layers of a model: find them, choose which parameters are trained, and compile the layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neko_lean.errors import NekoLeanError
from neko_lean.models import CausalLM, add_adapters, quantize_base
from neko_lean.recipe import Recipe


def decoder_layers(lm: CausalLM) -> nn.ModuleList:
    """Find the model's decoder layers and check that each can be run again on its own.

    Raises NekoLeanError if there is no list of layers, if the forward pass does not call each of them once and in
    order, or if a layer receives more than hidden states from other layers.
    """
    family = type(lm.model).__name__
    layers = getattr(lm.backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise NekoLeanError(f"{family} has no list of decoder layers.")

    # Watch the layers' inputs during a forward pass over two tokens.
    order: list[int] = []
    entangled = False

    def watch(number: int) -> Callable[..., None]:
        def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal entangled
            order.append(number)
            others = tree_leaves((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
            entangled |= any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in others)

        return before_layer

    hooks = [layer.register_forward_pre_hook(watch(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        with torch.enable_grad():
            lm.hidden(torch.zeros(1, 2, dtype=torch.int64, device=lm.device))
    finally:
        for hook in hooks:
            hook.remove()

    if order != list(range(len(layers))) or entangled:
        raise NekoLeanError(f"the layers of {family} pass on more than their hidden states.")
    return layers


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile each layer's forward for any input shape.

    Layers of the same kind share the compiled code. Hooks stay outside of it.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def prepare_student(lm: CausalLM, recipe: Recipe, device: torch.device, seed: int = 0) -> None:
    """Make of a loaded model the student that a recipe trains: with adapters, and a quantised base, if it says so.

    Args:
        lm: the model, in host memory if its base is to be quantised.
        recipe: the run's recipe.
        device: where the student is to run.
        seed: random seed of the adapters.

    Raises NekoLeanError if the model cannot be quantised or adapted so.
    """
    if recipe.quantize_base != "none":
        quantize_base(lm, recipe.quantize_base, device)
    if recipe.lora_rank:
        add_adapters(lm, recipe.lora_rank, recipe.lora_alpha or 2.0 * recipe.lora_rank, recipe.lora_targets, seed)


def freeze(lm: CausalLM, train_last: int = 0, train_only: str = "") -> None:
    """Set `requires_grad` of each parameter.

    Args:
        lm: the student.
        train_last: if above 0, train only the last `train_last` layers, the modules after them and an untied head.
        train_only: regular expression; if given, train only the parameters in whose names it occurs.

    Raises NekoLeanError if `train_last` exceeds the number of layers, or if nothing would be trained.
    """
    if train_last:
        layers = decoder_layers(lm)
        if train_last > len(layers):
            raise NekoLeanError(
                f"train_last is {train_last}, but the model has only {len(layers)} layers; choose 1 to {len(layers)}."
            )
        modules = [*layers[len(layers) - train_last :], *_modules_after(lm, layers)]
        if lm.head is not lm.embedding:
            modules.append(lm.model.get_output_embeddings())
        trained = {parameter for module in modules for parameter in module.parameters()}
        for parameter in lm.model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in trained)

    if train_only:
        any_trained = False
        for name, parameter in lm.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and re.search(train_only, name) is not None)
            any_trained |= parameter.requires_grad
        if not any_trained:
            raise NekoLeanError(f"train_only {train_only!r} matches the name of no trainable parameter.")


@torch.no_grad()
def _modules_after(lm: CausalLM, layers: nn.ModuleList) -> list[nn.Module]:
    """Modules of the backbone that run after its last layer: the final norm, and in some families a projection."""
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
