"""8-bit Adam that steps inside the backward pass and rounds stochastically into bfloat16 weights.

Each parameter is stepped as soon as its gradient is complete and the gradient is freed at once (LOMO,
arXiv 2306.09782), so gradients never sit in memory together. The update itself is bitsandbytes' blockwise 8-bit Adam
(arXiv 2110.02861), run on slices lifted to float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

BLOCK = 256  # elements that share one quantisation scale in bitsandbytes' blockwise Adam
SLICE = 2**22  # elements lifted to float32 at a time (16 MiB each of weight and gradient); a multiple of BLOCK
MIN_8BIT = 4096  # smaller tensors keep 32-bit state, as bitsandbytes itself does


@dataclass
class _State:
    """Adam's two moments of one parameter: 8-bit codes with a scale a block, or float32 where `scale1` is None."""

    first: Tensor  # [numel] uint8 or float32
    second: Tensor  # [numel]
    scale1: Tensor | None = None  # [ceil(numel / BLOCK)] float32
    scale2: Tensor | None = None


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """float32 [n] -> bfloat16 [n], up or down with the probability that makes the mean right.

    Near 0.02 a bfloat16 step is 1.2e-4, more than an Adam update at lr 5e-5 moves a weight: rounding to nearest would
    leave it where it was. Adding 16 random low bits and truncating keeps the update in expectation.
    """
    count = value.numel()
    noise = torch.empty(-(-count // 4), dtype=torch.int64, device=value.device)
    noise.random_(-(2**63), None, generator=generator)  # four 16-bit draws in one
    low = noise.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)
    # The carry out of the low half is the rounding; infinities and the canonical NaN stay what they are.
    high = (value.view(torch.int32) + low).view(torch.int16)[1::2]
    return high.view(torch.bfloat16)


class InBackwardAdam8bit:
    """Adam over `parameters`, stepped by hooks while `loss.backward()` runs between `begin_step` calls.

    There is no global gradient norm and no undo: check that the loss is finite before backward begins.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.lr, self.step = 0.0, 0
        device = self.parameters[0].device
        self.generator = torch.Generator(device).manual_seed(seed)
        self._codes = (
            bnb.create_dynamic_map(signed=True).to(device),
            bnb.create_dynamic_map(signed=False).to(device),
        )
        self._states: dict[int, _State] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in self.parameters]

    def begin_step(self, lr: float) -> None:
        """Count one step; the backward pass that follows applies it with learning rate `lr`."""
        self.step += 1
        self.lr = lr

    def close(self) -> None:
        """Take the hooks off the parameters; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def state_bytes(self) -> int:
        """Bytes of Adam state held."""
        tensors = [t for s in self._states.values() for t in (s.first, s.second, s.scale1, s.scale2)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def _new_state(self, parameter: nn.Parameter) -> _State:
        n, device = parameter.numel(), parameter.device
        if n < MIN_8BIT:
            return _State(torch.zeros(n, device=device), torch.zeros(n, device=device))
        blocks = -(-n // BLOCK)
        return _State(
            torch.zeros(n, dtype=torch.uint8, device=device),
            torch.zeros(n, dtype=torch.uint8, device=device),
            torch.zeros(blocks, device=device),
            torch.zeros(blocks, device=device),
        )

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        state = self._states.get(id(parameter))
        if state is None:
            state = self._states[id(parameter)] = self._new_state(parameter)
        weight, gradient = parameter.view(-1), parameter.grad.view(-1)
        for start in range(0, weight.numel(), SLICE):
            part = slice(start, start + SLICE)
            # Both in float32: the CUDA kernel dispatches on the gradient's dtype alone and would misread a mixed pair.
            lifted = weight[part].float()
            self._adam(state, part, gradient[part].float(), lifted)
            if weight.dtype == torch.bfloat16:
                weight[part] = round_stochastically(lifted, self.generator)
            else:
                weight[part] = lifted
        parameter.grad = None

    def _adam(self, state: _State, part: slice, gradient: Tensor, weight: Tensor) -> None:
        beta1, beta2 = self.betas
        if state.scale1 is None or state.scale2 is None:
            bnb.optimizer_update_32bit(
                "adam", gradient, weight, state.first[part], beta1, self.eps, self.step, self.lr,
                state2=state.second[part], beta2=beta2, weight_decay=self.weight_decay,
            )  # fmt: skip
            return
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        bnb.optimizer_update_8bit_blockwise(
            "adam", gradient, weight, state.first[part], state.second[part], beta1, beta2, 0.0, 0.0, self.eps,
            self.step, self.lr, *self._codes, state.scale1[blocks], state.scale2[blocks],
            weight_decay=self.weight_decay,
        )  # fmt: skip
