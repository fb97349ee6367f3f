"""Run identical layers once on fake tensors, and repeat what they allocated for every other call.

A model of 32 equal layers makes the same allocations 32 times for each micro-batch. Here a layer's forward and backward
pass is recorded in isolation, once for each kind of call. All calls then repeat the recorded allocations in order, so
that the counted bytes are those of running every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from neko_lean.errors import NekoLeanError
from neko_lean.memory.estimate import GRADIENTS
from neko_lean.memory.live_tensors import Block, LiveTensors


@dataclass(frozen=True)
class _Recording:
    """What one call of a layer allocates and frees. Blocks are numbered in the order of their allocation."""

    forward: list[tuple[int, int]]
    """Block and sign of each event of the forward pass."""

    backward: list[tuple[int, int]]
    """The same of the backward pass; empty if there is none."""

    blocks: list[Block]
    hidden: int | None
    """Block of the layer's input, and so on for the next ones."""

    out: int
    out_grad: int | None
    hidden_grad: int | None
    grads: dict[int, int]
    """Blocks of the gradients that are alive after the backward pass, by index of the parameter."""

    given: frozenset[int]
    """Blocks that the caller provides: the input, the other arguments and the gradient of the output."""

    kept_arguments: tuple[bool, ...]
    """Whether each of the other arguments is kept for the backward pass."""

    out_index: int | None
    """Index of the hidden states in a tuple of outputs; None if the output is a tensor."""

    out_length: int


class CannotRepeatError(NekoLeanError):
    """A layer of a shortened model makes allocations that cannot be repeated; only the whole model tells the peak."""


@dataclass
class Recordings:
    """What the layers of a model allocate, by kind of layer and call. All steps of the model share it."""

    kinds: dict[Any, int] = field(default_factory=dict)
    calls: dict[Any, _Recording | None] = field(default_factory=dict)
    """None for a call that cannot be repeated."""


def repeat_layers(
    layers: nn.ModuleList,
    live: LiveTensors,
    recordings: Recordings,
    *,
    holds_inputs: bool,
    checkpointed: bool = False,
) -> None:
    """Replace the forward of each layer by one that repeats what identical calls allocate.

    Args:
        layers: layers that pass on hidden states only, from `decoder_layers`.
        live: counts the allocations.
        recordings: of earlier steps of the same model, to which those of this step are added.
        holds_inputs: whether the caller holds each layer's input, and the gradient of its output, until the backward
            pass of the layer is over. Otherwise autograd frees them as early as it can.
        checkpointed: whether the layers keep only their inputs for the backward pass.
    """
    anchor = torch.empty(0, requires_grad=True)
    for number, layer in enumerate(layers):
        kind = recordings.kinds.setdefault(_structure(layer), len(recordings.kinds))
        layer.forward = _RepeatedLayer(layer, number, (kind, checkpointed), live, recordings, holds_inputs, anchor)


@contextmanager
def each_kind_once(model: nn.Module) -> Iterator[None]:
    """Within this context, only the first layer of each kind runs; the others return their input.

    Enough to find out what a model consists of, in a fraction of the time.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    first: dict[Any, nn.Module] = {}
    is_tensor: dict[nn.Module, bool] = {}
    replaced: list[nn.Module] = []
    hooks = []

    def pass_on(kind: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if is_tensor[kind] else (hidden,)

        return forward

    def note(layer: nn.Module, _: Any, out: Any) -> None:
        is_tensor[layer] = isinstance(out, Tensor)

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            kind = first.setdefault(_structure(module), module)
            if kind is module:
                hooks.append(module.register_forward_hook(note))
            else:
                module.forward = pass_on(kind)
                replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward
        for hook in hooks:
            hook.remove()


class _RepeatedLayer:
    """The forward of one layer."""

    def __init__(
        self,
        layer: nn.Module,
        number: int,
        kind: tuple[int, bool],
        live: LiveTensors,
        recordings: Recordings,
        holds_inputs: bool,
        anchor: Tensor,
    ) -> None:
        self.run, self.live, self.recordings, self.holds_inputs = layer.forward, live, recordings, holds_inputs
        self.parameters = list(layer.parameters())
        self.number, self.kind, self.anchor = number, kind, anchor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.live.enter_layer(self.number)
        by_name = not args
        hidden, others = (kwargs["hidden_states"] if by_name else args[0]), args[1:]
        kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        call = _Call(self, hidden, by_name, *_describe(others, kwargs))
        recording = call.recording()
        if recording is None:  # this kind of layer cannot be repeated
            if self.live.is_shortened:
                raise CannotRepeatError("the allocations of a layer cannot be repeated.")
            return self.run(*args, **kwargs, **({"hidden_states": hidden} if by_name else {}))
        anchor = self.anchor if call.has_graph else None
        out = _Repeat.apply(hidden, anchor, call, recording, tree_leaves((others, kwargs)))  # type: ignore[no-untyped-call]
        if recording.out_index is None:
            return out
        return tuple(out if number == recording.out_index else None for number in range(recording.out_length))


@dataclass(eq=False)
class _Call:
    """A call of a layer, without the arguments themselves, which it would keep alive."""

    layer: _RepeatedLayer
    hidden: Tensor | None  # [b, l, d]
    by_name: bool
    arguments: tuple[Any, ...]
    """The other arguments and keyword arguments, flattened: shape, dtype and strides of a tensor, or the value."""
    structure: TreeSpec

    def __post_init__(self) -> None:
        assert self.hidden is not None
        self.needs_grad = torch.is_grad_enabled() and self.hidden.requires_grad
        trains = any(parameter.requires_grad for parameter in self.layer.parameters)
        self.has_graph = torch.is_grad_enabled() and (self.needs_grad or trains)
        self.like = _Like.of(self.hidden)
        values = (leaf if isinstance(leaf, _PLAIN) else type(leaf) for leaf in self.arguments)
        self.inputs = tuple(values), str(self.structure)

    def new_hidden(self) -> Tensor:
        """A tensor like the layer's input."""
        return self.like.new()

    def recording(self) -> _Recording | None:
        """What calls of this kind allocate, recorded at the first of them; None if they cannot be repeated."""
        recordings, parameters = self.layer.recordings.calls, self.layer.parameters
        state = tuple((parameter.requires_grad, parameter.grad is not None) for parameter in parameters)
        key = self.layer.kind, self.like, self.inputs, self.needs_grad, self.has_graph, state
        if key not in recordings:
            recordings[key] = _record(self)
        return recordings[key]


class _Repeat(torch.autograd.Function):
    """The forward and backward pass of a layer, reduced to what they allocate and free."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, anchor: Tensor | None, call: _Call, recording: _Recording, arguments: list[Any]
    ) -> Tensor:
        """Repeat the forward pass. `anchor` makes the result part of a graph if only parameters need gradients."""
        ctx.call, ctx.blocks = call, {}
        made = _repeat(recording, recording.forward, ctx.blocks, call, {recording.out: call.new_hidden})
        if not call.has_graph or (recording.hidden, -1) in recording.forward:  # nothing keeps it for the backward pass
            call.hidden = None
        ctx.arguments = [leaf for leaf, kept in zip(arguments, recording.kept_arguments, strict=True) if kept]
        return made[recording.out]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Repeat the backward pass."""
        call: _Call = ctx.call
        call.layer.live.enter_layer(call.layer.number)
        with torch.enable_grad():
            recording = call.recording()  # another one than in forward if parameters have gradients by now
        assert recording is not None
        live, parameters = call.layer.live, call.layer.parameters

        # These are tensors; all other blocks are only counted.
        tensors: dict[int, Callable[[], Tensor]] = {
            block: (lambda index=index: torch.empty_like(parameters[index]))  # type: ignore[misc]
            for index, block in recording.grads.items()
        }
        if recording.hidden_grad is not None:
            tensors[recording.hidden_grad] = call.new_hidden
        given = (recording.out_grad, grads[0]), (recording.hidden, call.hidden)
        for number, tensor in given:
            block = None if tensor is None or call.layer.holds_inputs else live.block(tensor)
            if number is not None and block is not None:
                ctx.blocks[number] = block

        made = _repeat(recording, recording.backward, ctx.blocks, call, tensors)
        for index, number in recording.grads.items():
            parameters[index].grad = made[number]
        live.label([made[block] for block in recording.grads.values()], GRADIENTS)
        call.hidden = None
        ctx.arguments.clear()
        ctx.blocks.clear()
        return None if recording.hidden_grad is None else made[recording.hidden_grad], None, None, None, None


def _repeat(
    recording: _Recording,
    events: list[tuple[int, int]],
    blocks: dict[int, Block],
    call: _Call,
    tensors: dict[int, Callable[[], Tensor]],
) -> dict[int, Tensor]:
    """Allocate and free what was recorded.

    Args:
        recording: what is repeated.
        events: its forward or its backward part.
        blocks: blocks that are alive, by number; changed in place.
        call: the call.
        tensors: how to make the blocks that have to be tensors, by number.

    Returns these tensors.
    """
    live, made = call.layer.live, {}
    for number, sign in events:
        if sign < 0:
            if number in blocks:  # the tensors that others hold are freed by them
                live.free(blocks.pop(number))
        elif number in tensors:
            with torch.no_grad():
                made[number] = tensors[number]()
        elif number not in recording.given:
            original = recording.blocks[number]
            blocks[number] = Block(original.bytes, original.kind)
            live.allocate(blocks[number])
    return made


class _Source(torch.autograd.Function):
    """The layer's input in a recording. It is not a leaf, so autograd frees it as early as in a whole model."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, like: _Like, seen: dict[str, Block | None], live: Any) -> Tensor:
        """A tensor of the input's shape."""
        ctx.seen, ctx.live = seen, live
        hidden = like.new()
        seen["hidden"] = live.block(hidden)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        """Remember the gradient's block."""
        ctx.seen["hidden_grad"] = ctx.live.block(grads[0])
        return None, None, None, None


class _Sink(torch.autograd.Function):
    """What follows the layer in a recording: it makes the gradient of the layer's output."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, seen: dict[str, Block | None], live: Any) -> Tensor:
        """Something without bytes to call backward on."""
        ctx.like, ctx.seen, ctx.live = _Like.of(out), seen, live
        return out.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """A gradient of the output's shape."""
        grad: Tensor = ctx.like.new()
        ctx.seen["out_grad"] = ctx.live.block(grad)
        return grad, None, None


def _record(call: _Call) -> _Recording | None:
    """Run a layer's forward and backward pass by itself. Returns None if such calls cannot be repeated."""
    layer, live = call.layer, call.layer.live
    had_grads = [parameter.grad is not None for parameter in layer.parameters]
    seen: dict[str, Block | None] = {}
    anchor = torch.empty(0, requires_grad=call.needs_grad)
    with live.recording() as events:
        # Forward.
        if call.needs_grad:
            hidden = _Source.apply(anchor, call.like, seen, live)  # type: ignore[no-untyped-call]
        else:
            hidden = call.like.new()
            seen["hidden"] = live.block(hidden)
        leaves = [leaf.new() if isinstance(leaf, _Like) else leaf for leaf in call.arguments]
        arguments = [live.block(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        result = _run(call, hidden, leaves)
        del hidden, leaves
        outputs = [result] if isinstance(result, Tensor) else list(result)
        places = [number for number, output in enumerate(outputs) if output is not None]
        if len(places) != 1 or not isinstance(outputs[places[0]], Tensor) or _Like.of(outputs[places[0]]) != call.like:
            return None
        out_index, out_length = (None if isinstance(result, Tensor) else places[0]), len(outputs)
        out = outputs[places[0]]
        seen["out"] = live.block(out)
        del result, outputs
        forward_events = len(events)

        # Backward.
        grads: dict[int, Block | None] = {}
        if call.has_graph:
            end = _Sink.apply(out, seen, live)  # type: ignore[no-untyped-call]
            del out
            torch.autograd.backward(end, torch.empty_like(end))
            for index, parameter in enumerate(layer.parameters):
                if parameter.grad is not None and not had_grads[index]:
                    grads[index] = live.block(parameter.grad)
                    parameter.grad = None
            del end
        recorded = list(events)

    # Replace blocks by numbers, which all recordings of such a call share.
    blocks = [block for block, sign in recorded if sign > 0]
    numbers: dict[Block | None, int] = {block: number for number, block in enumerate(blocks)}
    given = [*arguments, seen["hidden"], seen.get("out_grad")]
    freed_in_forward = {block for block, sign in recorded[:forward_events] if sign < 0}
    if seen["out"] is None or any(block is None for block in grads.values()):
        return None
    for grad in grads.values():
        blocks[numbers[grad]].kind = GRADIENTS
    numbered = [(numbers[block], sign) for block, sign in recorded]
    return _Recording(
        forward=numbered[:forward_events],
        backward=numbered[forward_events:],
        blocks=blocks,
        hidden=numbers[seen["hidden"]],
        out=numbers[seen["out"]],
        out_grad=numbers.get(seen.get("out_grad")),
        hidden_grad=numbers.get(seen.get("hidden_grad")),
        grads={index: numbers[block] for index, block in grads.items()},
        given=frozenset(numbers[block] for block in given if block is not None),
        kept_arguments=tuple(block is not None and block not in freed_in_forward for block in arguments),
        out_index=out_index,
        out_length=out_length,
    )


def _run(call: _Call, hidden: Tensor, leaves: list[Any]) -> Any:
    """Call the layer itself."""
    args, kwargs = tree_unflatten(leaves, call.structure)
    return call.layer.run(**kwargs, hidden_states=hidden) if call.by_name else call.layer.run(hidden, *args, **kwargs)


@dataclass(frozen=True)
class _Like:
    """What allocations depend on in a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def new(self) -> Tensor:
        """Another such tensor."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype)


_NUMBERS = int, float, str, bool, type(None)
_PLAIN = _Like, *_NUMBERS


def _describe(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], TreeSpec]:
    """Arguments with tensors replaced by descriptions, flattened, and their structure."""
    leaves, structure = tree_flatten((args, kwargs))
    return tuple(_Like.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves), structure


def layer_kind(layer: nn.Module) -> Any:
    """Everything that the allocations of a layer may depend on, and which of its parameters are trained."""
    return _structure(layer), tuple(parameter.requires_grad for parameter in layer.parameters())


def _structure(layer: nn.Module) -> Any:
    """Everything in a layer that its allocations may depend on, except its place in the model."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        values = [
            (key, value) for key, value in vars(module).items() if isinstance(value, _NUMBERS) and key != "layer_idx"
        ]
        tensors = [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in module.named_buffers(recurse=False)]
        tensors += [(key, tuple(p.shape), p.dtype) for key, p in module.named_parameters(recurse=False)]
        parts.append((name, type(module), tuple(values), tuple(tensors)))
    return tuple(parts)
