"""What a run will need, before it runs, and what it did need, after.

The prediction runs the step's own code on fake tensors (shapes without storage) and counts what is alive, so it knows
no architecture and cannot drift from the code. It takes a config, no weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neko_lean.distributed import world_size
from neko_lean.errors import NekoLeanError
from neko_lean.models import (
    CHUNK_ELEMENTS,
    CausalLM,
    backbone_of,
    checkpoint_activations,
    load_config,
    plain_outputs,
    stated_softcap,
)
from neko_lean.recipes import Recipe, forgets
from neko_lean.training import (
    SLICE,
    UPDATE_BYTES,
    LayerPass,
    MicroBatches,
    decoder_layers,
    freeze,
    select_hidden,
    split_across_ranks,
    state_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
from neko_lean.memory.live_tensors import LiveTensors

# cuBLAS's and cuBLASLt's workspaces as PyTorch allocates them on a Hopper card, 32 MiB each; smaller on other cards.
WORKSPACES = 2**26


CONTEXT = 600 * 2**20 + WORKSPACES  # what CUDA and its libraries take of a card in addition to tensors


# Code and modules that a first step reads in: the model's and bitsandbytes' modules, pages of torch's kernels.
# No model's tensors: seen as the growth, beyond its weights, of loading a model of 5 MiB and taking its first step.
FIRST_USE = 25 * 2**20


@dataclass(frozen=True)
class Need:
    """Bytes that a step holds, wherever they lie (`lines`), and peaks at."""

    lines: dict[str, int]
    peak: int  # on the device
    host: int  # in host memory, where something was sent there
    cpu: int = 0  # on a CPU beyond the tensors: what its kernels and its allocator hold of the resident set

    def on(self, device: torch.device) -> int:
        """The peak in the memory that `device` has: on a CPU the growth of the process's resident set, on a GPU what
        PyTorch allocates."""
        return self.peak + (self.host + self.cpu if device.type == "cpu" else WORKSPACES)


def full_step(recipe: Recipe) -> list[tuple[int, int]]:
    """The largest step that a recipe can make, as micro-batches (rows, length): rows of full length, no padding.

    Forget and retain rows share `batch_tokens`, as `data.paired_batches` has it, which lets one row of each pass
    whatever their length. A substitute comes on top for each forget row, since it is not counted there.
    """
    length = recipe.max_length
    most = {"forget": recipe.forget_rows if forgets(recipe) else 0}
    most["retain"] = recipe.retain_rows if recipe.retain is not None else 0
    turns = [["forget"], ["retain"]] if recipe.order == "alternating" else [["forget", "retain"]]

    def in_turn(sets: Sequence[str]) -> int:
        # A forget row without an objective of its own takes room for its substitute, but may itself be short.
        trained = [name for name in sets if most[name] and (name == "retain" or recipe.forget is not None)]
        shared = min(sum(most[name] for name in trained), max(len(trained), recipe.batch_tokens // length))
        return shared + (most["forget"] if "forget" in sets and recipe.substitute != "none" else 0)

    rows = max(1, *map(in_turn, turns))
    together = max(1, recipe.micro_tokens // length) if recipe.backward == "layerwise" else rows
    return [(min(together, rows - start), length) for start in range(0, rows, together)]


def _of_one(micro: Sequence[tuple[int, int]], ranks: int) -> list[tuple[int, int]]:
    """The first rank's of a full step's micro-batches, dealt out as a step does."""
    starts = [0, *accumulate(rows for rows, _ in micro)]
    length = micro[0][1]
    groups = split_across_ranks([range(a, b) for a, b in pairwise(starts)], [length] * starts[-1], ranks)
    return [(len(group), length) if group else (1, 1) for group in groups[: len(groups) // ranks]]


def predict(
    config: Path | PreTrainedConfig,
    recipe: Recipe,
    micro: Sequence[tuple[int, int]],
    wanted: Sequence[int] | None = None,
    ranks: int = 1,
) -> Need:
    """What one step of neko-lean needs; of several `ranks` what one does, whose `micro` and `wanted` are its own.

    Args:
        config: the model's, or a folder that holds config.json; no weights are read.
        recipe: the run's.
        micro: rows and length (b, l) of each micro-batch of the step.
        wanted: positions of each that reach the head; None: all.

    Raises NekoLeanError where the model's layers cannot be walked and the recipe asks for it.
    """
    held = _held(config, recipe, micro, wanted, ranks)
    return _need(*held, recipe.offload_state, recipe.offload_activations)


def predicted_peak(
    config: PreTrainedConfig, recipe: Recipe, micro: Sequence[Sequence[int]], wanted: Sequence[int], on: torch.device
) -> int | None:
    """Bytes that a step which was taken was to need by `predict`; None where there was no step."""
    if not micro:
        return None
    try:
        return predict(config, recipe, [(rows, length) for rows, length in micro], wanted, world_size()).on(on)
    except Exception:  # of the model's own code on fake tensors: it must not cost a finished run
        return None


def _held(
    config: Path | PreTrainedConfig,
    recipe: Recipe,
    micro: Sequence[tuple[int, int]],
    wanted: Sequence[int] | None = None,
    ranks: int = 1,
) -> tuple[dict[str, int], int, int]:
    """A step's `lines` with everything on the device, how many bytes of layer inputs could leave it, and what a CPU
    holds beyond the tensors."""
    with FakeTensorMode(), _silent_fake_tensors():
        lm = fake_model(config, getattr(torch, recipe.dtype))
        freeze(lm, recipe.train_last, recipe.train_only)
        learning = [p for p in lm.model.parameters() if p.requires_grad]
        ids = [torch.zeros(shape, dtype=torch.int64) for shape in micro]
        index = [torch.zeros(n, dtype=torch.int64) for n in wanted or [rows * length for rows, length in micro]]
        with LiveTensors() as live:
            inputs = _step(lm, recipe, MicroBatches(ids, [None] * len(ids), index), live)
        gathered = _gathered(lm) if ranks > 1 else 0
    widest = max(rows * length for rows, length in micro) * lm.head.shape[1] * lm.head.element_size()
    lines = {
        "student weights": _bytes(lm.model.parameters()) // ranks,
        "teacher weights": 0,
        "Adam state": sum(state_size(p.numel(), recipe.state_bits) for p in learning) // ranks,
        **({"gathered from other ranks": gathered} if ranks > 1 else {}),
        "gradients, the largest alone": max(_bytes([p]) for p in learning),
        "layer inputs": inputs,
        "logits of a chunk": _chunk_bytes(lm, sum(map(len, index))),
        "peak of all but weights and state": live.peak,
    }
    # Of inputs in host memory one is used on the device while the next arrives.
    return lines, max(0, inputs - 2 * widest), live.resident - live.peak + FIRST_USE


def _gathered(lm: CausalLM) -> int:
    """Bytes that a rank has gathered of others when it needs most: embeddings, norm and head while the losses go back
    through the head, or then a layer, which FSDP receives in one piece and copies into its parameters."""
    layers = [_bytes(layer.parameters()) for layer in decoder_layers(lm)]
    return max(_bytes(lm.model.parameters()) - sum(layers), 2 * max(layers))


def _need(lines: dict[str, int], movable: int, cpu: int, offload_state: bool, offload_activations: bool) -> Need:
    host = (lines["Adam state"] if offload_state else 0) + (movable if offload_activations else 0)
    kept = ("student weights", "Adam state", "gathered from other ranks", "peak of all but weights and state")
    together = sum(lines.get(name, 0) for name in kept)
    return Need(lines, together - host, host, cpu)


@contextmanager
def _silent_fake_tensors() -> Iterator[None]:
    """Keep PyTorch from logging operators that fake tensors do not support, before it raises what is handled here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def fake_model(config: Path | PreTrainedConfig, dtype: torch.dtype) -> CausalLM:
    """A model without storage from its config; under FakeTensorMode only."""
    from transformers import AutoModelForCausalLM

    shape = load_config(config) if isinstance(config, Path) else config
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=False).eval()
    plain_outputs(model)
    try:
        backbone = backbone_of(model)
    except NekoLeanError as error:
        raise NekoLeanError(f"memory cannot be predicted from the config alone in {dtype}: {error}") from error
    return CausalLM(model, backbone, softcap=stated_softcap(shape))


def _step(lm: CausalLM, recipe: Recipe, micro: MicroBatches, live: LiveTensors) -> int:
    """One step's allocations; returns the bytes of the layers' inputs that it keeps."""

    def complete(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            torch.empty(UPDATE_BYTES * min(SLICE, parameter.numel()), dtype=torch.uint8)
            parameter.grad = None

    walk, inputs = None, 0
    if recipe.backward == "layerwise":
        walk = LayerPass(lm, decoder_layers(lm))
        hidden = walk.forward(micro)
        inputs = sum(_bytes([call.hidden]) for calls in walk.calls for call in calls)
    else:
        if recipe.backward == "checkpointed":
            checkpoint_activations(lm.model)
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(complete)
        hidden = select_hidden(lm, micro)
    # token_stats looks at values, which fake tensors lack: its buffers and gradients stand for it.
    head: nn.Parameter = lm.head  # type: ignore[assignment]
    slope = torch.empty_like(hidden)
    if head.requires_grad:
        head.grad = torch.empty_like(head)
        if head.dtype == torch.bfloat16:
            # The last chunk's product adds to the head's gradient while its logits and their gradient are there.
            alive = torch.empty(_chunk_bytes(lm, len(hidden)) * 6 // (4 * _chunk_buffers(lm)), dtype=torch.uint8)
            live.scratch(4 * head.numel())
            del alive
    logits = _chunk_bytes(lm, len(hidden)) // _chunk_buffers(lm)
    buffers = [torch.empty(logits, dtype=torch.uint8) for _ in range(_chunk_buffers(lm))]
    del buffers
    if head is not lm.embedding and walk is None:
        complete(head)
    torch.autograd.backward(hidden, slope)
    del hidden, slope
    if walk is not None:
        walk.backward(complete)
    return inputs


def _chunk_bytes(lm: CausalLM, positions: int) -> int:
    return 4 * _chunk_buffers(lm) * min(CHUNK_ELEMENTS, positions * lm.head.shape[0])


def _chunk_buffers(lm: CausalLM) -> int:
    """Float32 buffers of a chunk's size: the logits, one for the student outside the top k, and a soft cap's slope."""
    return 2 if lm.softcap is None else 3


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
