"""Adam's update of a float32 slice of a parameter, by bitsandbytes (8-bit state) or torchao (4-bit state)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError
from neko_lean.training.adam_state import AdamState

AdamUpdate = Callable[[AdamState, Tensor, Tensor, int, float], None]
"""`update(state, grad, weight, step, lr)` changes state and weight in place; grad and weight are float32 [n]."""


@dataclass(frozen=True)
class AdamSettings:
    """Hyperparameters of Adam; the weight decay is decoupled."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


def adam_8bit_update(settings: AdamSettings, device: torch.device) -> AdamUpdate:
    """bitsandbytes' update: blockwise for 8-bit state, the 32-bit one for float32 state."""
    import bitsandbytes.functional as bnb  # takes seconds, and `plan` needs the optimizer's state but no update

    (beta1, beta2), eps, weight_decay = settings.betas, settings.eps, settings.weight_decay
    signed = bnb.create_dynamic_map(signed=True).to(device)
    unsigned = bnb.create_dynamic_map(signed=False).to(device)

    def update(state: AdamState, grad: Tensor, weight: Tensor, step: int, lr: float) -> None:
        if state.scale1 is None or state.scale2 is None:
            bnb.optimizer_update_32bit(
                "adam", grad, weight, state.first, beta1, eps, step, lr,
                state2=state.second, beta2=beta2, weight_decay=weight_decay,
            )  # fmt: skip
        else:
            bnb.optimizer_update_8bit_blockwise(
                "adam", grad, weight, state.first, state.second, beta1, beta2, 0.0, 0.0, eps,
                step, lr, signed, unsigned, state.scale1, state.scale2, weight_decay=weight_decay,
            )  # fmt: skip

    return update


def adam_4bit_update(settings: AdamSettings, device: torch.device) -> AdamUpdate:
    """torchao's update, on views of the state. Raises NekoLeanError if torchao is not installed."""
    try:
        from torchao.optim.adam import single_param_adam
        from torchao.optim.subclass_4bit import OptimState4bit, get_qmap_signed, get_qmap_unsigned
    except ImportError as error:
        raise NekoLeanError("4-bit optimizer state needs torchao; run pip install 'neko-lean[torchao]'.") from error
    eps, weight_decay = settings.eps, settings.weight_decay
    signed_map = torch.tensor(get_qmap_signed(), device=device)
    unsigned_map = torch.tensor(get_qmap_unsigned(), device=device)

    def moment(codes: Tensor, scale: Tensor | None, signed: bool, shape: torch.Size) -> Tensor:
        if scale is None:
            return codes
        qmap = signed_map if signed else unsigned_map
        wrapped: Tensor = OptimState4bit(codes, scale, qmap, signed, shape, dtype=torch.float32)
        return wrapped

    def update(state: AdamState, grad: Tensor, weight: Tensor, step: int, lr: float) -> None:
        first = moment(state.first, state.scale1, True, weight.shape)
        second = moment(state.second, state.scale2, False, weight.shape)
        step_tensor, lr_tensor = (torch.tensor(float(value), device=device) for value in (step, lr))
        single_param_adam(
            weight, grad, step_tensor, first, second, None, lr_tensor, *settings.betas, weight_decay, eps, True, False
        )

    return update
