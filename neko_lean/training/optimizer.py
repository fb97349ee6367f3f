"""8-bit Adam that steps inside the backward pass and rounds stochastically into bfloat16 weights.

Each parameter is stepped as soon as its gradient is complete and the gradient is freed at once (LOMO,
arXiv 2306.09782), so gradients never sit in memory together. The update itself is bitsandbytes' blockwise 8-bit Adam
(arXiv 2110.02861), run on slices lifted to float32. With weight decay it is AdamW: bitsandbytes' decay is decoupled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from neko_lean.distributed import all_reduce_sum, any_rank, rank
from neko_lean.errors import NekoLeanError, NonFiniteError
from neko_lean.models import local_shard

BLOCK = 256  # elements that share one quantisation scale in bitsandbytes' blockwise Adam


SLICE = 2**22  # elements lifted to float32 at a time (16 MiB each of weight and gradient); a multiple of BLOCK


UPDATE_BYTES = 18  # working memory of an update, an element of its slice


BLOCK_4BIT = 128  # the same in torchao's 4-bit state (arXiv 2309.01507), two elements a byte


MIN_8BIT = 4096  # smaller tensors keep 32-bit state, as bitsandbytes itself does


def refuse_not_finite(name: str, gradient: Tensor) -> None:
    """Raise NotFinite where an element of a gradient is, on this rank or on another. Waits for the GPU."""
    # aminmax hands NaN on and needs no memory: 0.23 ns an element on one core, where isfinite().all() takes 7.
    wrong = gradient.numel() > 0 and not torch.stack(torch.aminmax(gradient)).isfinite().all()
    if any_rank(wrong, gradient.device):
        raise NonFiniteError(f"the gradient of {name} is not finite")


def state_size(n: int, bits: int = 8) -> int:
    """Bytes of Adam state that a tensor of n elements gets."""
    if n < MIN_8BIT:
        return 8 * n
    if bits == 8:
        return 2 * n + 8 * -(-n // BLOCK)
    return n + 8 * (n // BLOCK_4BIT) if n % BLOCK_4BIT == 0 else 8 * n


@dataclass
class _State:
    """Adam's two moments of one parameter: 8-bit codes (or 4-bit, two a byte) with a scale a block, or float32 where
    `scale1` is None."""

    first: Tensor  # [numel] uint8 or float32, [numel / 2] uint8 at 4 bits
    second: Tensor
    scale1: Tensor | None = None  # [ceil(numel / block)] float32
    scale2: Tensor | None = None

    def part(self, part: slice, bits: int) -> _State:
        """Views of the elements `part`, which begins at a block."""
        if self.scale1 is None or self.scale2 is None:
            return _State(self.first[part], self.second[part])
        block, packed = (BLOCK, 1) if bits == 8 else (BLOCK_4BIT, 2)
        codes = slice(part.start // packed, part.stop // packed)
        blocks = slice(part.start // block, -(-part.stop // block))
        return _State(self.first[codes], self.second[codes], self.scale1[blocks], self.scale2[blocks])

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


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
    """Adam over named parameters. `update` steps one whose gradient is complete and frees that gradient.

    Whoever runs the backward pass calls `update`; `attach` makes autograd do it, for a pass over one graph. There is
    no global gradient norm and no undo: check that the loss is finite before backward begins. A gradient that is not
    raises NotFinite; `updated` then says how many parameters are a step ahead of the others.

    Args:
        named: (name, parameter) pairs, as `model.named_parameters()` gives them; frozen ones are left out.
        betas, eps, weight_decay: as in Adam; the decay is decoupled (AdamW).
        clip: largest L2 norm of one tensor's gradient; 0: none. It takes the place of the global norm, which would
            need all gradients at once.
        bits: of the state: 8, or 4 through torchao.
        offload: keep the state in host memory (pinned beside a GPU) and bring it over slice by slice.
        seed: of the stochastic rounding.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float = 0.0,
        bits: int = 8,
        offload: bool = False,
        seed: int = 0,
    ) -> None:
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.betas, self.eps, self.weight_decay, self.clip = betas, eps, weight_decay, clip
        self.lr, self.step, self.bits = 0.0, 0, bits
        self.updated = 0  # parameters that this step has begun to change
        self.device = next(iter(self.parameters.values())).device
        self.offload = offload
        # Ranks step different weights, so they draw different numbers; the first draws those of one process.
        self.generator = torch.Generator(self.device).manual_seed(seed + 2**32 * rank())
        signed, unsigned = (bnb.create_dynamic_map(signed=signed).to(self.device) for signed in (True, False))
        self._codes: tuple[Tensor, Tensor] = signed, unsigned
        self._adam = self._adam_8bit if bits == 8 else self._adam_4bit()
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._copies = torch.cuda.Stream(self.device) if offload and self.device.type == "cuda" else None
        # All of it before the first step: made during backward it would lie scattered among gradients that are freed,
        # and the holes they leave cost a third of the whole (7.05 GiB instead of 5.45 resident at 1.28 billion).
        self._states = {name: self._new_state(local_shard(p).numel(), p.numel()) for name, p in self.parameters.items()}

    def attach(self) -> None:
        """Have autograd call `update` for each parameter as soon as `loss.backward()` has completed its gradient."""
        self._hooks = [p.register_post_accumulate_grad_hook(self.update) for p in self.parameters.values()]

    def close(self) -> None:
        """Take the hooks off the parameters; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def begin_step(self, lr: float) -> None:
        """Count one step; the updates that follow apply it with learning rate `lr`."""
        self.step += 1
        self.lr, self.updated = lr, 0

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """Step one parameter by its gradient and free that. Raises NotFinite before it changes anything."""
        if parameter.grad is None:
            return
        name = self._names[id(parameter)]
        weight, gradient = local_shard(parameter).view(-1), local_shard(parameter.grad).reshape(-1)
        sharded = isinstance(parameter, DTensor)
        refuse_not_finite(name, gradient)
        self.updated += 1
        scale = self._clip_scale(gradient, sharded)
        for part, state in self._slices(self._states[name], weight.numel()):
            # Both in float32: the CUDA kernel dispatches on the gradient's dtype alone and would misread a mixed pair.
            lifted, slope = weight[part].float(), gradient[part].float()
            if scale is not None:
                slope = slope * scale
            self._adam(state, slope, lifted)
            if weight.dtype == torch.bfloat16:
                weight[part] = round_stochastically(lifted, self.generator)
            else:
                weight[part] = lifted
        parameter.grad = None

    def state_bytes(self) -> int:
        """Bytes of Adam state held, wherever it lies."""
        return sum(t.numel() * t.element_size() for s in self._states.values() for t in s.tensors().values())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the weights that the next step depends on, as tensors that safetensors can write."""
        if self._copies is not None:
            self._copies.synchronize()
        tensors = {f"state.{name}.{key}": t for name, s in self._states.items() for key, t in s.tensors().items()}
        return {**tensors, "step": torch.tensor(self.step), "generator": self.generator.get_state()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave. Raises NekoLeanError when it belongs to other parameters."""
        mine = self.state_dict()
        if set(tensors) != set(mine):
            raise NekoLeanError("the optimizer state belongs to other parameters: it is another model's.")
        for key, theirs in tensors.items():
            if theirs.shape != mine[key].shape or theirs.dtype != mine[key].dtype:
                raise NekoLeanError(f"the optimizer's {key} is of another shape: it is another model's.")
        for key, theirs in tensors.items():
            mine[key].copy_(theirs)
        self.step = int(tensors["step"])
        self.generator.set_state(tensors["generator"])

    def _new_state(self, n: int, of: int) -> _State:
        """Of n elements of a parameter that has `of` in all."""
        where = torch.device("cpu") if self.offload else self.device

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=where, pin_memory=self._copies is not None)

        if of < MIN_8BIT or (self.bits == 4 and n % BLOCK_4BIT):
            return _State(zeros(n, torch.float32), zeros(n, torch.float32))
        codes, blocks = (n, -(-n // BLOCK)) if self.bits == 8 else (n // 2, n // BLOCK_4BIT)
        moments = (zeros(codes, torch.uint8), zeros(codes, torch.uint8))
        return _State(*moments, zeros(blocks, torch.float32), zeros(blocks, torch.float32))

    def _clip_scale(self, gradient: Tensor, sharded: bool) -> Tensor | None:
        """min(1, clip / norm) of a flat gradient [n], or of the one whose part it is if that is `sharded`; None where
        nothing is clipped. Never waits for the GPU."""
        if not self.clip:
            return None
        norm = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradient.split(SLICE)]).norm()
        if sharded:
            norm = all_reduce_sum(norm**2).sqrt()
        scale: Tensor = (self.clip / norm.clamp(min=1e-12)).clamp(max=1.0)
        return scale

    def _slices(self, state: _State, n: int) -> Iterator[tuple[slice, _State]]:
        """Slices of n elements with their state on the device; what is done to it there is kept.

        Beside a GPU, host state is fetched a slice ahead and stored on a stream of its own, so that copies and updates
        overlap; both directions share the stream, so a slice is never fetched before it was stored.
        """
        parts = [slice(start, min(n, start + SLICE)) for start in range(0, n, SLICE)]
        if self._copies is None or not parts:
            yield from ((part, state.part(part, self.bits)) for part in parts)
            return
        compute = torch.cuda.current_stream(self.device)
        coming = self._fetch(state.part(parts[0], self.bits))
        for number, part in enumerate(parts):
            here = coming
            compute.wait_stream(self._copies)
            if number + 1 < len(parts):
                coming = self._fetch(state.part(parts[number + 1], self.bits))
            yield part, here
            self._copies.wait_stream(compute)
            with torch.cuda.stream(self._copies):
                for key, host in state.part(part, self.bits).tensors().items():
                    device_side = getattr(here, key)
                    host.copy_(device_side, non_blocking=True)
                    device_side.record_stream(self._copies)

    def _fetch(self, host: _State) -> _State:
        with torch.cuda.stream(self._copies):
            found = {key: t.to(self.device, non_blocking=True) for key, t in host.tensors().items()}
        for t in found.values():  # made on one stream, used on another
            t.record_stream(torch.cuda.current_stream(self.device))
        return _State(**found)

    def _adam_8bit(self, state: _State, gradient: Tensor, weight: Tensor) -> None:
        """bitsandbytes' update of a float32 slice, weight and state in place."""
        beta1, beta2 = self.betas
        if state.scale1 is None or state.scale2 is None:
            bnb.optimizer_update_32bit(
                "adam", gradient, weight, state.first, beta1, self.eps, self.step, self.lr,
                state2=state.second, beta2=beta2, weight_decay=self.weight_decay,
            )  # fmt: skip
            return
        bnb.optimizer_update_8bit_blockwise(
            "adam", gradient, weight, state.first, state.second, beta1, beta2, 0.0, 0.0, self.eps,
            self.step, self.lr, *self._codes, state.scale1, state.scale2, weight_decay=self.weight_decay,
        )  # fmt: skip

    def _adam_4bit(self) -> Callable[[_State, Tensor, Tensor], None]:
        """torchao's update of a float32 slice, on views of our state."""
        try:
            from torchao.optim.adam import single_param_adam
            from torchao.optim.subclass_4bit import OptimState4bit, get_qmap_signed, get_qmap_unsigned
        except ImportError as error:
            raise NekoLeanError("4-bit optimizer state needs torchao: pip install 'neko-lean[torchao]'.") from error
        maps = [torch.tensor(m(), device=self.device) for m in (get_qmap_signed, get_qmap_unsigned)]

        def moment(codes: Tensor, scale: Tensor | None, signed: bool, shape: torch.Size) -> Tensor:
            if scale is None:
                return codes
            wrapped: Tensor = OptimState4bit(codes, scale, maps[not signed], signed, shape, dtype=torch.float32)
            return wrapped

        def update(state: _State, gradient: Tensor, weight: Tensor) -> None:
            first = moment(state.first, state.scale1, True, weight.shape)
            second = moment(state.second, state.scale2, False, weight.shape)
            step, lr = (torch.tensor(float(x), device=self.device) for x in (self.step, self.lr))
            decay, eps = self.weight_decay, self.eps
            single_param_adam(weight, gradient, step, first, second, None, lr, *self.betas, decay, eps, True, False)

        return update
