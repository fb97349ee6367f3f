"""What must be known of a model family before its numbers can be trusted: how its logits follow from its hidden states,
whether a token sees later ones, how many positions it can embed.

Each is found by running the loaded model once on a few tokens, not by the family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neko_lean.errors import NekoLeanError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# Beyond any logit of a trained model, so that a soft cap is saturated: tanh is exactly 1 there in float32.
SATURATED = 1e6


NEAR_ZERO = 1e-4  # for a soft cap above 0.05 tanh(x) is x to 1e-6 there


SPREAD = 30.0  # standard deviation of the logits on which the transformation is verified


# Switches in config.json that change what a forward pass returns, not what it computes.
OUTPUT_SWITCHES = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class HeadCall:
    """One forward pass of the whole model, from the backbone's output to the logits."""

    hidden: Tensor  # [n, d], the backbone's output
    head_input: Tensor  # [n, d], what reached the head
    logits: Tensor  # [n, V]


def reset_output_switches(model: PreTrainedModel) -> None:
    """Have every forward pass return named outputs and nothing extra, whatever config.json asks for."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        for key, value in OUTPUT_SWITCHES.items():
            if hasattr(config, key) and getattr(config, key) != value:
                setattr(config, key, value)


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns hidden states into logits.

    Raises NekoLeanError where there is none, or one which is more than a matrix and a bias.
    """
    head = model.get_output_embeddings()
    family = type(model).__name__
    if head is None:
        raise NekoLeanError(f"{family} has no output embedding: it is not a causal language model.")
    if type(head).forward is not nn.Linear.forward or not isinstance(head, nn.Linear):
        raise NekoLeanError(f"{family} is not supported: its output embedding is {type(head).__name__}, not a Linear.")
    return head


def find_backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a model whose `last_hidden_state` is what its head takes: the base model, or in some families the
    decoder in it. Tensors without storage do.

    Raises NekoLeanError where there is no such part.
    """
    head = linear_head(model)
    outputs: list[tuple[nn.Module, Tensor]] = []
    head_inputs: list[Tensor] = []

    def note_output(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(getattr(output, "last_hidden_state", None), Tensor):
            outputs.append((module, output.last_hidden_state))

    def note_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        head_inputs.append(args[0])

    hooks = [module.register_forward_hook(note_output) for module in model.modules() if module is not model]
    hooks.append(head.register_forward_pre_hook(note_input))
    ids = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
    try:
        _run(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    for module, states in reversed(outputs):  # the outermost ends last
        if head_inputs and _from_one(states, head_inputs[-1]):
            return module
    raise NekoLeanError(
        f"{type(model).__name__} is not supported: its output embedding takes something else than the backbone's last "
        f"hidden states."
    )


def _from_one(states: Tensor, other: Tensor) -> bool:
    """Whether `other` is `states` or a multiple of them, in any dtype."""
    if states.untyped_storage()._cdata == other.untyped_storage()._cdata:
        return True
    same_shape = states.shape == other.shape and type(states) is Tensor
    return same_shape and _constant_ratio(other.float(), states.float()) is not None


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, calling `module` runs `forward` instead of its own."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def logit_transform(model: PreTrainedModel, backbone: nn.Module) -> tuple[float, float | None]:
    """(scale, softcap) of `head.LogitTransform`, read off the model's own forward pass; softcap None: no cap.

    The backbone's output is replaced by large hidden states and the head's by float32 logits, so that what the family
    does before and after the head shows without the rounding of the model's dtype.

    Raises NekoLeanError where it is anything else than a scale and a soft cap.
    """
    head, family = linear_head(model), type(model).__name__
    width, vocabulary = head.in_features, head.out_features
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, width, generator=generator) * SPREAD  # [1, 4, d]
    z = torch.randn(4, vocabulary, generator=generator) * SPREAD  # [4, V]
    z[0] = torch.where(z[0] > 0, NEAR_ZERO, -NEAR_ZERO)
    z[1] = torch.where(z[1] > 0, SATURATED, -SATURATED)
    hidden, z = hidden.to(head.weight.device), z.to(head.weight.device)

    call = _call_with(model, backbone, hidden, z)

    before = _constant_ratio(call.head_input, call.hidden)
    if before is None or (before != 1.0 and head.bias is not None):
        raise NekoLeanError(f"{family} is not supported: it changes hidden states before its output embedding.")
    numbers = [value for value in _numbers(model.config) if value]
    scale = _snapped(float((call.logits[0] / z[0]).median()), [*numbers, *(1 / value for value in numbers)])
    limit = float(call.logits[1].abs().max())
    softcap = None if abs(limit / (scale * SATURATED) - 1) < 1e-3 else _snapped(limit, numbers)
    wanted = z * scale if softcap is None else softcap * torch.tanh(z * scale / softcap)
    if not torch.allclose(call.logits, wanted, rtol=1e-5, atol=1e-5):
        raise NekoLeanError(
            f"{family} is not supported: it changes its logits by something else than a bias, a scale or a soft cap."
        )
    return scale * before, softcap


def _call_with(model: PreTrainedModel, backbone: nn.Module, hidden: Tensor, z: Tensor) -> HeadCall:
    """Run the model on four tokens, `hidden` [1, 4, d] standing in for its hidden states and `z` [4, V] for what the
    head makes of them. Raises NekoLeanError where either does not happen."""
    head = linear_head(model)
    seen: list[Tensor] = []
    given: list[Tensor] = []

    def capture(states: Tensor) -> Tensor:
        seen.append(states)
        return z.view(*states.shape[:-1], -1)

    def substitute(_: nn.Module, __: Any, output: Any) -> Any:
        given.append(hidden.to(output.last_hidden_state.dtype))
        output.last_hidden_state = given[0]
        return output

    family = type(model).__name__
    hook = backbone.register_forward_hook(substitute)
    ids = torch.arange(4, device=hidden.device)[None] % len(head.weight)  # [1, 4]
    try:
        with replaced_forward(head, capture):
            logits = _run(model, ids).logits
    finally:
        hook.remove()
    if len(given) != 1 or len(seen) != 1 or seen[0].shape != hidden.shape or logits.shape[1:] != z.shape:
        raise NekoLeanError(
            f"{family} is not supported: its logits are not computed from its last hidden states alone."
        )
    return HeadCall(given[0][0].float(), seen[0][0].float(), logits[0].float())


def _constant_ratio(values: Tensor, of: Tensor) -> float | None:
    """The factor from `of` to `values`, within the rounding of half precision; None where there is no single one."""
    if any(torch.equal(values, of.to(dtype).float()) for dtype in (torch.float32, torch.bfloat16, torch.float16)):
        return 1.0
    ratio = float((values / of).median())
    return _snapped(ratio, [1.0]) if torch.allclose(values, of * ratio, rtol=2**-6, atol=1e-6) else None


def _snapped(value: float, numbers: list[float]) -> float:
    """The number that `value` is a rounded copy of, if there is one in `numbers` or it is 1."""
    near = min([1.0, *numbers], key=lambda number: abs(number - value))
    return near if abs(near - value) <= 1e-5 * abs(value) else value


def _numbers(config: PreTrainedConfig) -> Iterator[float]:
    """The numbers in a config, nested configs left out."""
    for value in vars(config.get_text_config()).values():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield float(value)


def stated_softcap(config: PreTrainedConfig) -> float | None:
    """The soft cap of the logits that config.json states, for a model without weights; None where it states none."""
    text = config.get_text_config()
    return next((value for name in SOFTCAPS if isinstance(value := getattr(text, name, None), int | float)), None)


def _run(model: PreTrainedModel, ids: Tensor) -> Any:
    """One forward pass of the whole model over ids [1, L]; NekoLeanError where the family's own code fails on them."""
    try:
        return model(input_ids=ids, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        family, reason = type(model).__name__, first_line(error)
        raise NekoLeanError(
            f"{family} is not supported: its forward pass fails on token ids alone ({reason})."
        ) from error
