"""Adam's update of a float32 slice of a parameter.

8-bit state is updated by bitsandbytes on a GPU and by `adam_8bit_cpu` on a CPU, 4-bit state by torchao.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError
from neko_lean.training.adam_8bit_cpu import blockwise_update_on_cpu
from neko_lean.training.adam_state import AdamSettings, AdamState, AdamUpdate


def adam_8bit_update(settings: AdamSettings, device: torch.device) -> AdamUpdate:
    """bitsandbytes' update: blockwise for 8-bit state, the 32-bit one for float32 state.

    On a CPU, the blockwise update is that of `adam_8bit_cpu`, with the same results.
    """
    import bitsandbytes.functional as bnb  # takes seconds, and `plan` needs the optimizer's state but no update

    (beta1, beta2), eps, weight_decay = settings.betas, settings.eps, settings.weight_decay
    signed = bnb.create_dynamic_map(signed=True).to(device)
    unsigned = bnb.create_dynamic_map(signed=False).to(device)

    def blockwise_on_gpu(state: AdamState, grad: Tensor, weight: Tensor, step: int, lr: float) -> None:
        assert state.scale1 is not None and state.scale2 is not None
        bnb.optimizer_update_8bit_blockwise(
            "adam", grad, weight, state.first, state.second, beta1, beta2, 0.0, 0.0, eps,
            step, lr, signed, unsigned, state.scale1, state.scale2, weight_decay=weight_decay,
        )  # fmt: skip

    blockwise = blockwise_update_on_cpu(settings, signed, unsigned) if device.type == "cpu" else blockwise_on_gpu

    def update(state: AdamState, grad: Tensor, weight: Tensor, step: int, lr: float) -> None:
        if state.scale1 is not None:
            blockwise(state, grad, weight, step, lr)
            return
        bnb.optimizer_update_32bit(
            "adam", grad, weight, state.first, beta1, eps, step, lr,
            state2=state.second, beta2=beta2, weight_decay=weight_decay,
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
