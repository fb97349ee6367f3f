"""How a model's backward pass goes: layer by layer, with activations checkpointed, or plain.

What the recipe asks for is used only where it gives the gradients of a plain backward pass: the layers of some families
share more than hidden states.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neko_lean.distributed import world_size
from neko_lean.errors import NekoLeanError, first_line
from neko_lean.models import CausalLM, Shards, checkpoint_activations
from neko_lean.recipes import Recipe
from neko_lean.terminal import log_line
from neko_lean.training.layerwise import LayerPass, decoder_layers, freeze
from neko_lean.training.micro_batches import MicroBatches

VERIFIED_TOKENS = 8


# Of the largest gradient's norm. Smaller gradients are compared with this: those of an attention key's bias are noise.
NEGLIGIBLE = 1e-2


@dataclass(frozen=True)
class Gradients:
    """What a backward pass over a few tokens gave."""

    hidden: Tensor  # [L, d], the last hidden states
    of_parameter: dict[str, Tensor]  # by name; parameters without a gradient are left out


def select_backward(student: CausalLM, recipe: Recipe, device: torch.device) -> tuple[Recipe, LayerPass | None]:
    """Freeze what the recipe freezes, and find the backward pass: the recipe's, or the next leaner one that is exact.

    Returns the recipe with the `backward` that is used, and the LayerPass where that is layerwise. Under torchrun each
    rank moves its part of the student to its `device`. Raises NekoLeanError where the model cannot be trained, or not
    spread over ranks.
    """
    freeze(student, recipe.train_last, recipe.train_only)
    if world_size() > 1 and recipe.backward != "layerwise":
        raise NekoLeanError(f"backward={recipe.backward} is for one process: under torchrun leave it at layerwise.")
    if world_size() > 1 and recipe.compile:
        raise NekoLeanError("compile=true is for one process: under torchrun leave it out.")

    student.model.eval()
    wanted = None if recipe.backward == "plain" else _explained(student, plain_gradients, student)
    if wanted is not None and recipe.backward == "layerwise":
        try:
            layers = decoder_layers(student)
            verify_layer_pass(student, layers, wanted)
            shards = Shards(student, layers, device) if world_size() > 1 else None
            return recipe, LayerPass(student, layers, offload=recipe.offload_activations, shards=shards)
        except NekoLeanError as error:
            if world_size() > 1:
                raise NekoLeanError(f"{error} So it cannot be spread over ranks: run it without torchrun.") from error
            log_line(
                f"warning: {error} Falling back to backward=checkpointed, in which a layer's activations are alive for "
                f"a step's {recipe.batch_tokens} positions at once instead of {recipe.micro_tokens}."
            )
            recipe = dataclasses.replace(recipe, backward="checkpointed", offload_activations=False)
    if wanted is not None and recipe.backward == "checkpointed":
        try:
            _checkpoint_verified(student, wanted)
        except NekoLeanError as error:
            log_line(f"warning: {error} Falling back to backward=plain, which keeps all activations of a step.")
            recipe = dataclasses.replace(recipe, backward="plain")
    return recipe, None


def plain_gradients(lm: CausalLM) -> Gradients:
    """One plain backward pass over a few tokens: the reference that other ways are compared with."""
    ids, upstream = _probe(lm)
    chosen = _compared_parameters(lm)
    with torch.enable_grad():
        hidden = lm.hidden(ids)[0]  # [L, d]
        gradients = torch.autograd.grad(hidden, list(chosen.values()), upstream, allow_unused=True)
    found = {name: grad for name, grad in zip(chosen, gradients, strict=True) if grad is not None}
    return Gradients(hidden.detach(), found)


def verify_layer_pass(lm: CausalLM, layers: nn.ModuleList, wanted: Gradients) -> None:
    """Raise NekoLeanError where LayerPass does not give the plain backward pass's gradients."""
    owned = [parameter for layer in layers for parameter in layer.parameters()]
    if len(set(owned)) < len(owned):
        raise NekoLeanError(f"the layers of {type(lm.model).__name__} share parameters.")
    _refuse_others(lm, wanted, _explained(lm, _layer_by_layer, lm, layers))


def _layer_by_layer(lm: CausalLM, layers: nn.ModuleList) -> Gradients:
    """Hidden states and gradients of one LayerPass over the tokens of `plain_gradients`."""
    ids, upstream = _probe(lm)
    names = {parameter: name for name, parameter in _compared_parameters(lm).items()}
    found: dict[str, Tensor] = {}

    def keep(parameter: nn.Parameter) -> None:
        if parameter in names and parameter.grad is not None:
            found[names[parameter]] = parameter.grad
        parameter.grad = None

    walk = LayerPass(lm, layers)
    everywhere = torch.arange(ids.shape[1], device=ids.device)
    hidden = walk.forward(MicroBatches([ids], [None], [everywhere]))  # [L, d]
    hidden.backward(upstream)
    walk.backward(keep)
    return Gradients(hidden.detach(), found)


def _checkpoint_verified(lm: CausalLM, wanted: Gradients) -> None:
    """Checkpoint a model's activations. Raises NekoLeanError, and undoes it, where that changes gradients."""
    checkpointed = checkpoint_activations(lm.model)
    try:
        if not checkpointed:
            raise NekoLeanError(f"{type(lm.model).__name__} has no layers that can be checkpointed.")
        _refuse_others(lm, wanted, _explained(lm, plain_gradients, lm))
    except NekoLeanError:
        for module in checkpointed:
            del module.forward
        raise


def _explained(lm: CausalLM, run: Callable[..., Gradients], *args: object) -> Gradients:
    """`run(*args)`; an error of the family's own code becomes a NekoLeanError."""
    try:
        return run(*args)
    except (NekoLeanError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = first_line(error)
        raise NekoLeanError(f"a backward pass through {type(lm.model).__name__} fails ({line}).") from error


def _refuse_others(lm: CausalLM, wanted: Gradients, got: Gradients) -> None:
    """Raise NekoLeanError, naming the first difference, where two passes differ by more than rounding."""
    tolerance = 0.02 if lm.head.dtype in (torch.bfloat16, torch.float16) else 1e-4
    largest = max((float(grad.float().norm()) for grad in wanted.of_parameter.values()), default=0.0)
    pairs: list[tuple[str, Tensor | None, Tensor | None, float]] = [
        ("the last hidden states", wanted.hidden, got.hidden, 0.0)
    ]
    pairs += [
        (f"the gradient of {name}", wanted.of_parameter.get(name), got.of_parameter.get(name), NEGLIGIBLE * largest)
        for name in (wanted.of_parameter | got.of_parameter)
    ]
    for name, one, other, floor in pairs:
        zero = torch.zeros((), device=lm.device)
        one, other = (zero if tensor is None else tensor.float() for tensor in (one, other))
        error = float((one - other).norm())
        if not error <= tolerance * max(float(one.norm()), floor):
            raise NekoLeanError(
                f"the layers of {type(lm.model).__name__} cannot be run again alone: {name} would change."
            )


def _probe(lm: CausalLM) -> tuple[Tensor, Tensor]:
    """Ids [1, L] and a gradient [L, d] on their last hidden states, the same at each call."""
    ids = torch.arange(3, 3 + VERIFIED_TOKENS, device=lm.device)[None] % len(lm.head)
    upstream = torch.randn(VERIFIED_TOKENS, lm.head.shape[1], generator=torch.Generator().manual_seed(0))
    return ids, upstream.to(lm.device, lm.head.dtype)


def _compared_parameters(lm: CausalLM) -> dict[str, nn.Parameter]:
    """The smallest parameter that learns of each layer and of each part outside them, by name: all their gradients
    together take no more than about one layer's."""
    chosen: dict[str, tuple[str, nn.Parameter]] = {}
    for name, parameter in lm.model.named_parameters():
        if not parameter.requires_grad or parameter is lm.embedding or parameter is lm.head:
            continue
        group = re.sub(r"(\.\d+)\..*", r"\1", name)  # model.layers.3.mlp.up_proj.weight -> model.layers.3
        if group not in chosen or parameter.numel() < chosen[group][1].numel():
            chosen[group] = name, parameter
    return dict(chosen.values())
