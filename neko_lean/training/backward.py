"""Choose how a model's backward pass runs: layer by layer, with checkpointed activations, or plain.

The layers of some families share more than hidden states. The recipe's choice is therefore used only if it gives the
gradients of a plain backward pass, which is verified on a few tokens.
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
from neko_lean.models import CausalLM, ShardedModel, checkpoint_activations
from neko_lean.recipe import Recipe
from neko_lean.terminal import log_line
from neko_lean.training.layers import decoder_layers, freeze
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.micro_batches import MicroBatches

# Tokens of the pass that is verified.
VERIFIED_TOKENS = 8

# Gradients below this fraction of the largest gradient's norm are compared with it instead of with their own norm. Some
# of them are only noise, such as those of an attention key's bias.
NEGLIGIBLE = 1e-2


@dataclass(frozen=True)
class Gradients:
    """Result of a forward and backward pass over a few tokens."""

    hidden: Tensor
    """Last hidden states [L, d]."""

    by_name: dict[str, Tensor]
    """Gradients of the compared parameters; parameters without a gradient are left out."""


def select_backward(student: CausalLM, recipe: Recipe, device: torch.device) -> tuple[Recipe, LayerPass | None]:
    """Freeze what the recipe freezes, and choose the backward pass: the recipe's, or the next one that is exact.

    Args:
        student: the student. With several ranks, it is sharded across them.
        recipe: the run's recipe; `backward` is the first choice.
        device: this rank's device.

    Returns the recipe with the `backward` that is used, and the LayerPass if that is "layerwise".

    Raises NekoLeanError if the model cannot be trained, or cannot be sharded across ranks.
    """
    freeze(student, recipe.train_last, recipe.train_only)
    _check_single_process_options(recipe)
    student.model.eval()
    if recipe.backward == "plain":
        return recipe, None
    expected = _explain_errors(student, plain_gradients, student)

    if recipe.backward == "layerwise":
        try:
            return recipe, _verified_layer_pass(student, recipe, device, expected)
        except NekoLeanError as error:
            if world_size() > 1:
                raise NekoLeanError(
                    f"{error} It can therefore not be sharded across ranks; run it without torchrun."
                ) from error
            log_line(
                f"warning: training needs more memory: falling back to backward=checkpointed, which holds a layer's "
                f"activations for all {recipe.batch_tokens} positions of a step instead of {recipe.micro_tokens}, "
                f"because {error}"
            )
            recipe = dataclasses.replace(recipe, backward="checkpointed", offload_activations=False)

    try:
        _checkpoint_and_verify(student, expected)
    except NekoLeanError as error:
        log_line(
            f"warning: training needs more memory: falling back to backward=plain, which holds all activations of a "
            f"step, because {error}"
        )
        recipe = dataclasses.replace(recipe, backward="plain")
    return recipe, None


def _check_single_process_options(recipe: Recipe) -> None:
    """Raise NekoLeanError for options that several ranks do not support."""
    if world_size() > 1 and recipe.backward != "layerwise":
        raise NekoLeanError(
            f"backward={recipe.backward} works only in a single process; under torchrun use backward=layerwise."
        )
    if world_size() > 1 and recipe.compile:
        raise NekoLeanError("compile=true works only in a single process; leave it out under torchrun.")


def _verified_layer_pass(student: CausalLM, recipe: Recipe, device: torch.device, expected: Gradients) -> LayerPass:
    """A LayerPass that gives the expected gradients. Raises NekoLeanError if the model does not allow it."""
    layers = decoder_layers(student)
    verify_layer_pass(student, layers, expected)
    shards = ShardedModel(student, layers, device) if world_size() > 1 else None
    return LayerPass(student, layers, offload=recipe.offload_activations, shards=shards)


def plain_gradients(lm: CausalLM) -> Gradients:
    """Run one plain forward and backward pass over a few tokens: the reference for other ways to run it."""
    ids, upstream = _verification_input(lm)
    parameters = _compared_parameters(lm)
    with torch.enable_grad():
        hidden = lm.hidden(ids)[0]  # [L, d]
        grads = torch.autograd.grad(hidden, list(parameters.values()), upstream, allow_unused=True)
    by_name = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    return Gradients(hidden.detach(), by_name)


def verify_layer_pass(lm: CausalLM, layers: nn.ModuleList, expected: Gradients) -> None:
    """Raise NekoLeanError if a LayerPass does not give the gradients of a plain backward pass."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    if len(set(parameters)) < len(parameters):
        raise NekoLeanError(f"the layers of {type(lm.model).__name__} share parameters.")
    _compare(lm, expected, _explain_errors(lm, _layerwise_gradients, lm, layers))


def _layerwise_gradients(lm: CausalLM, layers: nn.ModuleList) -> Gradients:
    """Run one LayerPass over the tokens of `plain_gradients`."""
    ids, upstream = _verification_input(lm)
    names = {parameter: name for name, parameter in _compared_parameters(lm).items()}
    by_name: dict[str, Tensor] = {}

    def collect(parameter: nn.Parameter) -> None:
        if parameter in names and parameter.grad is not None:
            by_name[names[parameter]] = parameter.grad
        parameter.grad = None

    layer_pass = LayerPass(lm, layers)
    all_positions = torch.arange(ids.shape[1], device=ids.device)  # [L]
    hidden = layer_pass.forward(MicroBatches([ids], [None], [all_positions]))  # [L, d]
    hidden.backward(upstream)
    layer_pass.backward(collect)
    return Gradients(hidden.detach(), by_name)


def _checkpoint_and_verify(lm: CausalLM, expected: Gradients) -> None:
    """Checkpoint the activations of a model. If that changes gradients, undo it and raise NekoLeanError."""
    checkpointed = checkpoint_activations(lm.model)
    try:
        if not checkpointed:
            raise NekoLeanError(f"{type(lm.model).__name__} has no layers that can be checkpointed.")
        _compare(lm, expected, _explain_errors(lm, plain_gradients, lm))
    except NekoLeanError:
        for module in checkpointed:
            del module.forward
        raise


def _explain_errors(lm: CausalLM, run: Callable[..., Gradients], *args: object) -> Gradients:
    """Return `run(*args)`; an exception of the family's own code becomes a NekoLeanError."""
    try:
        return run(*args)
    except (NekoLeanError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NekoLeanError(
            f"a backward pass through {type(lm.model).__name__} fails ({first_line(error)})."
        ) from error


def _compare(lm: CausalLM, expected: Gradients, actual: Gradients) -> None:
    """Raise NekoLeanError, naming the first difference, if two passes differ by more than rounding."""
    tolerance = 0.02 if lm.head.dtype in (torch.bfloat16, torch.float16) else 1e-4
    largest = max((float(grad.float().norm()) for grad in expected.by_name.values()), default=0.0)
    pairs: list[tuple[str, Tensor | None, Tensor | None, float]] = [
        ("the last hidden states", expected.hidden, actual.hidden, 0.0)
    ]
    pairs += [
        (f"the gradient of {name}", expected.by_name.get(name), actual.by_name.get(name), NEGLIGIBLE * largest)
        for name in (expected.by_name | actual.by_name)
    ]

    zero = torch.zeros((), device=lm.device)
    for name, reference, value, floor in pairs:
        reference, value = (zero if tensor is None else tensor.float() for tensor in (reference, value))
        error = float((reference - value).norm())
        if not error <= tolerance * max(float(reference.norm()), floor):
            raise NekoLeanError(
                f"the layers of {type(lm.model).__name__} cannot be run again on their own: {name} would change."
            )


def _verification_input(lm: CausalLM) -> tuple[Tensor, Tensor]:
    """Token ids [1, L] and a gradient [L, d] of their last hidden states, the same at each call."""
    ids = torch.arange(3, 3 + VERIFIED_TOKENS, device=lm.device)[None] % len(lm.head)
    upstream = torch.randn(VERIFIED_TOKENS, lm.head.shape[1], generator=torch.Generator().manual_seed(0))
    return ids, upstream.to(lm.device, lm.head.dtype)


def _compared_parameters(lm: CausalLM) -> dict[str, nn.Parameter]:
    """The smallest trainable parameter of each layer and of each module outside the layers, by name.

    The gradients of all of them together take no more memory than those of about one layer.
    """
    smallest: dict[str, tuple[str, nn.Parameter]] = {}
    for name, parameter in lm.model.named_parameters():
        if not parameter.requires_grad or parameter is lm.embedding or parameter is lm.head:
            continue
        if ".lora_A." in name:
            continue  # its gradient is zero as long as lora_B is
        group = re.sub(r"(\.\d+)\..*", r"\1", name)  # model.layers.3.mlp.up_proj.weight -> model.layers.3
        if group not in smallest or parameter.numel() < smallest[group][1].numel():
            smallest[group] = name, parameter
    return dict(smallest.values())
