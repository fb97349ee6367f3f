"""How a model family computes logits from hidden states: its backbone, its output embedding and its logit transform.

Each is found by running the loaded model on a few tokens, not by looking up the family's name.
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

# Larger than any logit of a trained model. It saturates a soft cap: tanh is exactly 1 there in float32.
SATURATED = 1e6

# Small enough to stay in the linear range of a soft cap: for caps above 0.05, tanh(x) equals x to 1e-6 there.
NEAR_ZERO = 1e-4

# Standard deviation of the logits on which a detected transform is verified.
SPREAD = 30.0

# Config keys that change which outputs a forward pass returns, and the values under which it returns the plain ones.
OUTPUT_SWITCHES = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}

# Config keys under which families state the soft cap of their logits.
SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class HeadCall:
    """What passed through the head in one forward pass of the whole model."""

    hidden: Tensor  # [n, d], the output of the backbone
    head_input: Tensor  # [n, d], the input of the head
    logits: Tensor  # [n, V], the output of the model


def reset_output_switches(model: PreTrainedModel) -> None:
    """Make every forward pass return a ModelOutput without attentions or hidden states, whatever config.json says."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for key, value in OUTPUT_SWITCHES.items():
            if hasattr(config, key) and getattr(config, key) != value:
                setattr(config, key, value)


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """The output embedding of a model.

    Raises:
        NekoLeanError: the model has none, or it is not a plain nn.Linear.
    """
    head = model.get_output_embeddings()
    family = type(model).__name__
    if head is None:
        raise NekoLeanError(f"{family} has no output embedding, so it is no causal language model; use another model.")
    if type(head).forward is not nn.Linear.forward or not isinstance(head, nn.Linear):
        raise NekoLeanError(
            f"{family} is not supported: its output embedding is a {type(head).__name__}, not a Linear; use a model "
            f"with a linear head."
        )
    return head


def find_backbone(model: PreTrainedModel) -> nn.Module:
    """The submodule whose `last_hidden_state` is the input of the head: the base model, or its decoder.

    Works with fake tensors (FakeTensorMode) too.

    Raises:
        NekoLeanError: there is no such submodule.
    """
    head = linear_head(model)
    outputs: list[tuple[nn.Module, Tensor]] = []
    head_inputs: list[Tensor] = []

    def record_output(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(getattr(output, "last_hidden_state", None), Tensor):
            outputs.append((module, output.last_hidden_state))

    def record_head_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        head_inputs.append(args[0])

    # Run two tokens and record every last_hidden_state on the way to the head.
    hooks = [module.register_forward_hook(record_output) for module in model.modules() if module is not model]
    hooks.append(head.register_forward_pre_hook(record_head_input))
    input_ids = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
    try:
        _forward(model, input_ids)
    finally:
        for hook in hooks:
            hook.remove()

    # The outermost module returns last.
    for module, hidden in reversed(outputs):
        if head_inputs and _is_multiple(head_inputs[-1], hidden):
            return module
    raise NekoLeanError(
        f"{type(model).__name__} is not supported: the input of its output embedding is not the last hidden state of "
        f"any submodule; use a model whose head reads the last hidden states directly."
    )


def detect_logit_transform(model: PreTrainedModel, backbone: nn.Module) -> tuple[float, float | None]:
    """Detect the scale and the soft cap of a model's logits from its own forward pass.

    The backbone's output is replaced by large hidden states and the head's output by float32 logits. What the family
    does before and after the head then shows without the rounding of the model's dtype.

    Returns:
        (scale, softcap) of LogitTransform; softcap is None if logits are not capped.

    Raises:
        NekoLeanError: the family does anything other than scaling and soft-capping.
    """
    head, family = linear_head(model), type(model).__name__
    hidden, z = (inputs.to(head.weight.device) for inputs in _probe_inputs(head.in_features, head.out_features))
    call = _call_with(model, backbone, hidden, z)

    # Before the head: a constant factor on the hidden states. With a bias it would not be a factor on the logits.
    input_scale = _constant_ratio(call.head_input, call.hidden)
    if input_scale is None or (input_scale != 1.0 and head.bias is not None):
        raise NekoLeanError(
            f"{family} is not supported: it changes its hidden states before the output embedding by something other "
            f"than a constant factor; use another model."
        )

    # After the head: the scale from logits near 0, the soft cap from saturated ones.
    config_values = [value for value in _config_numbers(model.config) if value]
    candidates = [*config_values, *(1 / value for value in config_values)]
    scale = _snap(float((call.logits[0] / z[0]).median()), candidates)
    largest = float(call.logits[1].abs().max())
    is_linear = abs(largest / (scale * SATURATED) - 1) < 1e-3
    softcap = None if is_linear else _snap(largest, config_values)

    # Verify both on logits of ordinary size.
    expected = z * scale if softcap is None else softcap * torch.tanh(z * scale / softcap)
    if not torch.allclose(call.logits, expected, rtol=1e-5, atol=1e-5):
        raise NekoLeanError(
            f"{family} is not supported: it changes its logits by something other than a bias, a scale or a soft cap; "
            f"use another model."
        )
    return scale * input_scale, softcap


def config_softcap(config: PreTrainedConfig) -> float | None:
    """The soft cap of the logits according to config.json, for a model without weights; None if there is none."""
    text_config = config.get_text_config()
    values = [getattr(text_config, key, None) for key in SOFTCAP_KEYS]
    return next((value for value in values if isinstance(value, int | float)), None)


def _probe_inputs(width: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Hidden states [1, 4, d] and outputs of the head [4, V]: the first near zero, the second saturated."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, width, generator=generator) * SPREAD
    z = torch.randn(4, vocab_size, generator=generator) * SPREAD
    z[0] = torch.where(z[0] > 0, NEAR_ZERO, -NEAR_ZERO)
    z[1] = torch.where(z[1] > 0, SATURATED, -SATURATED)
    return hidden, z


def _call_with(model: PreTrainedModel, backbone: nn.Module, hidden: Tensor, z: Tensor) -> HeadCall:
    """Run the model on four tokens with the output of the backbone replaced by `hidden` [1, 4, d] and the output of the
    head replaced by `z` [4, V].

    Raises:
        NekoLeanError: backbone and head are not each called once, on hidden states of this shape.
    """
    head = linear_head(model)
    head_inputs: list[Tensor] = []
    backbone_outputs: list[Tensor] = []

    def replace_head(states: Tensor) -> Tensor:
        head_inputs.append(states)
        return z.view(*states.shape[:-1], -1)

    def replace_output(_: nn.Module, __: Any, output: Any) -> Any:
        backbone_outputs.append(hidden.to(output.last_hidden_state.dtype))
        output.last_hidden_state = backbone_outputs[0]
        return output

    hook = backbone.register_forward_hook(replace_output)
    input_ids = torch.arange(4, device=hidden.device)[None] % len(head.weight)  # [1, 4]
    try:
        with _replaced_forward(head, replace_head):
            logits = _forward(model, input_ids).logits  # [1, 4, V]
    finally:
        hook.remove()

    called_once = len(backbone_outputs) == 1 and len(head_inputs) == 1
    if not called_once or head_inputs[0].shape != hidden.shape or logits.shape[1:] != z.shape:
        raise NekoLeanError(
            f"{type(model).__name__} is not supported: its logits are not computed by one call of its output embedding "
            f"on the last hidden states; use another model."
        )
    return HeadCall(backbone_outputs[0][0].float(), head_inputs[0][0].float(), logits[0].float())


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which calling `module` runs `forward` instead of the module's own."""
    instance_forward = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if instance_forward is not None:
            module.forward = instance_forward


def _forward(model: PreTrainedModel, input_ids: Tensor) -> Any:
    """The outputs of the whole model for `input_ids` [1, L]. Raises NekoLeanError if its own code fails."""
    try:
        return model(input_ids=input_ids, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # modeling code raises any type
        raise NekoLeanError(
            f"{type(model).__name__} is not supported: its forward pass fails when given token ids only "
            f"({first_line(error)}); use a model that needs no other inputs."
        ) from error


def _is_multiple(values: Tensor, base: Tensor) -> bool:
    """Whether `values` is `base` times a constant; dtypes may differ."""
    if base.untyped_storage()._cdata == values.untyped_storage()._cdata:
        return True
    # A fake tensor has no values to compare.
    comparable = base.shape == values.shape and type(base) is Tensor
    return comparable and _constant_ratio(values.float(), base.float()) is not None


def _constant_ratio(values: Tensor, base: Tensor) -> float | None:
    """The factor from `base` to `values`, up to the rounding of half precision; None if no single factor fits."""
    if any(torch.equal(values, base.to(dtype).float()) for dtype in (torch.float32, torch.bfloat16, torch.float16)):
        return 1.0
    ratio = float((values / base).median())
    return _snap(ratio, [1.0]) if torch.allclose(values, base * ratio, rtol=2**-6, atol=1e-6) else None


def _snap(value: float, candidates: list[float]) -> float:
    """The candidate (or 1) that `value` equals up to rounding; `value` itself if there is none."""
    nearest = min([1.0, *candidates], key=lambda candidate: abs(candidate - value))
    return nearest if abs(nearest - value) <= 1e-5 * abs(value) else value


def _config_numbers(config: PreTrainedConfig) -> Iterator[float]:
    """The numbers in the config of the text model, without those of nested configs."""
    for value in vars(config.get_text_config()).values():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield float(value)
