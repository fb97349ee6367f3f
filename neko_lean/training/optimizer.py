"""Adam with 8-bit state that updates parameters during the backward pass.

Each parameter is updated as soon as its gradient is complete, and the gradient is freed at once (LOMO, arXiv
2306.09782), so gradients are never in memory together. The update is bitsandbytes' blockwise 8-bit Adam (arXiv
2110.02861) on float32 slices, on a CPU with operators of our own; the result is rounded stochastically to bfloat16
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from neko_lean.distributed import all_reduce_sum, any_rank, rank
from neko_lean.errors import NekoLeanError, NonFiniteError
from neko_lean.models import local_shard
from neko_lean.training.adam_state import AdamSettings, AdamState, fetch_parts, new_state
from neko_lean.training.adam_update import adam_4bit_update, adam_8bit_update
from neko_lean.training.rounding import round_stochastically

SLICE = 2**22  # elements updated in float32 at a time, 16 MiB each of weight and gradient; a multiple of the block size


def update_bytes(dtype: torch.dtype, bits: int) -> int:
    """Bytes of working memory of an update, per element of its slice.

    Float32 weights with 8-bit state are updated in place: at most a scaled gradient, and on a CPU five float32 buffers
    of a quarter of the slice. Otherwise, there are float32 copies of weight, gradient or moments, and random bits.

    Args:
        dtype: dtype of the weights.
        bits: bits of the optimizer's state.
    """
    return 9 if dtype == torch.float32 and bits == 8 else 18


def refuse_non_finite(name: str, grad: Tensor) -> None:
    """Raise NonFiniteError if a gradient contains NaN or infinity, on this rank or another. Waits for the GPU."""
    # aminmax passes NaN on and allocates nothing: 0.23 ns per element on one core, against 7 for isfinite().all().
    wrong = grad.numel() > 0 and not torch.stack(torch.aminmax(grad)).isfinite().all()
    if any_rank(wrong, grad.device):
        raise NonFiniteError(f"the gradient of {name} is not finite")


class InBackwardAdam8bit:
    """Adam over named parameters. `update` applies one parameter's gradient and frees it.

    The code that runs the backward pass calls `update`. For a backward pass over a single graph, `attach` makes
    autograd call it. There is no global gradient norm and no undo, so check that the loss is finite before the backward
    pass. For a gradient that is not finite, `update` raises NonFiniteError; `updated` then tells how many parameters
    have been updated already.

    Args:
        named_parameters: (name, parameter) pairs, as from `model.named_parameters()`; frozen ones are left out.
        betas, eps, weight_decay: as in `torch.optim.AdamW`; the decay is decoupled.
        clip: largest L2 norm of one tensor's gradient; 0 disables clipping. It replaces clipping by the global norm,
            which would need all gradients at once.
        bits: bits of the state's values: 8, or 4 with torchao.
        offload: keep the state in host memory (pinned if the parameters are on a GPU) and fetch it slice by slice.
        seed: random seed of the stochastic rounding.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
        >>> optimizer = InBackwardAdam8bit(model.named_parameters(), weight_decay=0.01)
        >>> optimizer.attach()
        >>> for step in range(3):
        ...     optimizer.begin_step(lr=1e-3)
        ...     model(torch.ones(1, 64, dtype=torch.bfloat16)).pow(2).sum().backward()
        >>> model.weight.grad is None
        True
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float = 0.0,
        bits: int = 8,
        offload: bool = False,
        seed: int = 0,
    ) -> None:
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.clip, self.bits, self.offload = clip, bits, offload
        self.lr, self.step = 0.0, 0
        self.updated = 0  # parameters whose update has begun in this step

        # Ranks update different weights, so they need different random numbers. The first rank's are those of a single
        # process.
        self.generator = torch.Generator(self.device).manual_seed(seed + 2**32 * rank())

        settings = AdamSettings(betas, eps, weight_decay)
        self._adam = (adam_8bit_update if bits == 8 else adam_4bit_update)(settings, self.device)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

        # The state is allocated before the first step. Allocated during backward, it would be scattered among gradients
        # that are freed, and the gaps would cost a third of the whole: 7.05 GiB resident instead of 5.45 for 1.28
        # billion parameters.
        self._copies = torch.cuda.Stream(self.device) if offload and self.device.type == "cuda" else None
        storage, pin = torch.device("cpu") if offload else self.device, self._copies is not None
        self._states = {
            name: new_state(local_shard(parameter).numel(), parameter.numel(), bits, storage, pin)
            for name, parameter in self.parameters.items()
        }

    def attach(self) -> None:
        """Make autograd call `update` for each parameter as soon as `loss.backward()` has completed its gradient."""
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self.update) for parameter in self.parameters.values()
        ]

    def close(self) -> None:
        """Remove the hooks of `attach`."""
        for hook in self._hooks:
            hook.remove()

    def begin_step(self, lr: float) -> None:
        """Begin a step, in which updates use learning rate `lr`."""
        self.step += 1
        self.lr, self.updated = lr, 0

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """Update one parameter with its gradient, and free the gradient.

        Raises NonFiniteError before anything is changed if the gradient is not finite.
        """
        if parameter.grad is None:
            return
        name = self._names[id(parameter)]
        weight = local_shard(parameter).view(-1)  # [n]
        grad = local_shard(parameter.grad).reshape(-1)  # [n]

        refuse_non_finite(name, grad)
        self.updated += 1
        scale = self._clip_scale(grad, sharded=isinstance(parameter, DTensor))

        for part, state in self._slices(self._states[name], weight.numel()):
            # Both are float32: the CUDA kernel dispatches on the gradient's dtype and would misread a mixed pair.
            weight_fp32, grad_fp32 = weight[part].float(), grad[part].float()
            if scale is not None:
                grad_fp32 = grad_fp32 * scale
            self._adam(state, grad_fp32, weight_fp32, self.step, self.lr)
            if weight.dtype == torch.bfloat16:
                weight[part] = round_stochastically(weight_fp32, self.generator)
            elif weight.dtype != torch.float32:  # otherwise weight_fp32 is a view, and the weight is updated already
                weight[part] = weight_fp32
        parameter.grad = None

    def state_bytes(self) -> int:
        """Bytes of Adam's state on the device or in host memory."""
        tensors = [tensor for state in self._states.values() for tensor in state.tensors().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything except the weights that later steps depend on, as tensors that safetensors can store."""
        if self._copies is not None:
            self._copies.synchronize()
        tensors = {
            f"state.{name}.{field}": tensor
            for name, state in self._states.items()
            for field, tensor in state.tensors().items()
        }
        return {**tensors, "step": torch.tensor(self.step), "generator": self.generator.get_state()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned. Raises NekoLeanError if it belongs to other parameters."""
        own = self.state_dict()
        if set(tensors) != set(own):
            raise NekoLeanError("the optimizer state belongs to other parameters; it was saved for another model.")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
                raise NekoLeanError(
                    f"the optimizer's {name} has shape {list(tensor.shape)} and {tensor.dtype}, expected "
                    f"{list(own[name].shape)} and {own[name].dtype}; it was saved for another model."
                )

        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        self.step = int(tensors["step"])
        self.generator.set_state(tensors["generator"])

    def _clip_scale(self, grad: Tensor, sharded: bool) -> Tensor | None:
        """min(1, clip / norm) for a gradient [n], or None if clipping is off. Does not wait for the GPU.

        For a sharded parameter, the norm is that of the whole gradient.
        """
        if not self.clip:
            return None
        norm = torch.stack([torch.linalg.vector_norm(part.float()) for part in grad.split(SLICE)]).norm()
        if sharded:
            norm = all_reduce_sum(norm**2).sqrt()
        scale: Tensor = (self.clip / norm.clamp(min=1e-12)).clamp(max=1.0)
        return scale

    def _slices(self, state: AdamState, numel: int) -> Iterator[tuple[slice, AdamState]]:
        """Slices of `numel` elements with their state on the device, which the caller changes in place."""
        parts = [slice(start, min(numel, start + SLICE)) for start in range(0, numel, SLICE)]
        if self._copies is None:
            return ((part, state.part(part, self.bits)) for part in parts)
        return fetch_parts(state, parts, self.bits, self.device, self._copies)
