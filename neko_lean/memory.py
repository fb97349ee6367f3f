"""What a run will need, before it runs, and what it did need, after.

The prediction runs the step's own code on fake tensors (shapes without storage) and counts what is alive, so it knows
no architecture and cannot drift from the code. It takes a config, no weights.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import logging
import resource
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neko_lean.errors import NekoLeanError, first_line
from neko_lean.families import backbone_of, plain_outputs, stated_softcap
from neko_lean.head import CHUNK_ELEMENTS
from neko_lean.layerwise import LayerPass, decoder_layers, freeze
from neko_lean.modeling import (
    CausalLM,
    checkpoint_activations,
    load_config,
    model_folder,
    model_name,
    usable_length,
)
from neko_lean.optim import SLICE, UPDATE_BYTES, state_size
from neko_lean.ranks import size
from neko_lean.recipes import Recipe, forgets, load_recipe
from neko_lean.step import chosen_hidden, dealt
from neko_lean.twomodels import WAYS, Way, two_model_loss

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# cuBLAS's and cuBLASLt's workspaces as PyTorch allocates them on a Hopper card, 32 MiB each; smaller on other cards.
WORKSPACES = 2**26
CONTEXT = 600 * 2**20 + WORKSPACES  # what CUDA and its libraries take of a card in addition to tensors
# glibc maps blocks from this size on one by one and returns each when it is freed; smaller ones lie in its heap, which
# stays resident where blocks were freed between others (DEFAULT_MMAP_THRESHOLD_MAX of its malloc.c on 64 bits).
OWN_MAPPING = 2**25
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


class LiveTensors(TorchDispatchMode):
    """Within `with LiveTensors() as live:` counts the storages that operators create, until each is freed.

    `live.now` and `live.peak` are bytes, `live.largest` those of the largest storage. Works on fake tensors too.

    `live.resident` is the peak that a CPU's process would see. Its heap does not shrink while a step runs, so the most
    that lay there at any time is counted together with the most that was mapped apart, whenever that was; and kernels
    take scratch that no tensor shows.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.largest = 0
        self._alive: dict[int, int] = {}
        self._mapped = self._mapped_peak = self._heap_peak = 0

    @property
    def resident(self) -> int:
        return self._heap_peak + self._mapped_peak

    def scratch(self, count: int) -> None:
        """Count `count` bytes of scratch that a CPU kernel allocates and frees while everything else is alive."""
        mapped = count if count >= OWN_MAPPING else 0
        self._mapped_peak = max(self._mapped_peak, self._mapped + mapped)
        self._heap_peak = max(self._heap_peak, self.now - self._mapped + count - mapped)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        out = operator(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and _key(one) not in given and _key(one) not in self._alive:
                storage = one.untyped_storage()
                self._alive[_key(one)] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                self._mapped += storage.nbytes() if storage.nbytes() >= OWN_MAPPING else 0
                self.scratch(0)
                weakref.finalize(storage, self._freed, _key(one))
        if operator in _PRODUCTS:
            self.scratch(_product_scratch(args[-2], out))
        return out

    def _freed(self, key: int) -> None:
        count = self._alive.pop(key, 0)
        self.now -= count
        self._mapped -= count if count >= OWN_MAPPING else 0


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _product_scratch(left: Tensor, out: Tensor) -> int:
    """Scratch bytes that a CPU kernel allocates for out = left @ right.

    torch adds up a bfloat16 product in float32. Where the left matrix is transposed, as for every weight's gradient, it
    holds all of the result at once so.
    """
    adds_up = out.dtype == torch.bfloat16 and left.dim() == 2 and left.stride(-1) != 1
    return 4 * out.numel() if adds_up else 0


def _key(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def full_step(recipe: Recipe) -> list[tuple[int, int]]:
    """The largest step that a recipe can make, as micro-batches (rows, length): rows of full length, no padding.

    Forget and retain rows share `batch_tokens`, as `data.paired_batches` has it, which lets one row of each pass
    whatever their length. A substitute comes on top for each forget row, since it is not counted there.
    """
    length = recipe.max_length
    most = {"forget": recipe.forget_rows if forgets(recipe) else 0}
    most["retain"] = recipe.retain_rows if recipe.retain_objective != "none" else 0
    turns = [["forget"], ["retain"]] if recipe.order == "alternating" else [["forget", "retain"]]

    def in_turn(sets: Sequence[str]) -> int:
        # A forget row without an objective of its own takes room for its substitute, but may itself be short.
        trained = [name for name in sets if most[name] and (name == "retain" or recipe.forget_objective != "none")]
        shared = min(sum(most[name] for name in trained), max(len(trained), recipe.batch_tokens // length))
        return shared + (most["forget"] if "forget" in sets and recipe.substitute != "none" else 0)

    rows = max(1, *map(in_turn, turns))
    together = max(1, recipe.micro_tokens // length) if recipe.backward == "layerwise" else rows
    return [(min(together, rows - start), length) for start in range(0, rows, together)]


def _of_one(micro: Sequence[tuple[int, int]], ranks: int) -> list[tuple[int, int]]:
    """The first rank's of a full step's micro-batches, dealt out as a step does."""
    starts = [0, *accumulate(rows for rows, _ in micro)]
    length = micro[0][1]
    groups = dealt([range(a, b) for a, b in pairwise(starts)], [length] * starts[-1], ranks)
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
        return predict(config, recipe, [(rows, length) for rows, length in micro], wanted, size()).on(on)
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
            inputs = _step(lm, recipe, ids, index, live)
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


def predict_two_models(config: Path, way: Way, rows: int, length: int) -> Need:
    """What one step of the two-model way needs, with `rows` rows of `length` tokens of each set; on a GPU."""
    shape = (rows, way.max_length or length)
    with FakeTensorMode(), _silent_fake_tensors():
        lm = fake_model(config, way.dtype)
        teacher = fake_model(config, way.dtype)
        if way.checkpointing:
            checkpoint_activations(lm.model)
        ids = torch.zeros(shape, dtype=torch.int64)
        with LiveTensors() as live:
            two_model_loss(lm.model, teacher.model, (ids, ids), (ids, ids), 0.2).backward()
    weights = _bytes(lm.model.parameters())
    # After backward all gradients are there, and AdamW's foreach form takes as much again for its denominators.
    moving = max(live.peak, 2 * weights)
    lines = {
        "student weights": weights,
        "teacher weights": weights,
        "Adam state": 2 * weights,
        "gradients, all": weights,
        "peak of all but weights and state": moving,
    }
    return Need(lines, 4 * weights + moving, 0)


def plan_run(
    model: str | Path, recipe: str | Path, overrides: Mapping[str, Any], card: int | None, gpus: int = 1
) -> dict[str, Any]:
    """The need of a recipe's largest step, for this tool (with several `gpus` that of each) and for two models, and
    which options fit a card of `card` bytes (`options`, flags of unlearn, or --set where the recipe is memorize's; None
    when not even all of them do)."""
    folder = model_folder(model, config_only=True)
    chosen = load_recipe(recipe, overrides)
    chosen = dataclasses.replace(chosen, max_length=usable_length(folder, chosen.max_length))
    try:
        held = _held_by_full_step(folder, chosen, gpus)
        note = ""
    except NekoLeanError as error:
        if gpus > 1 or chosen.backward != "layerwise":
            raise
        chosen = dataclasses.replace(chosen, backward="checkpointed", offload_activations=False)
        held = _held_by_full_step(folder, chosen, gpus)
        note = f" with backward=checkpointed, as {str(error).removesuffix('.')}"

    micro = full_step(chosen)
    length = micro[0][1]
    rows = sum(one[0] for one in micro)
    needs = {"neko-lean": _need(*held, chosen.offload_state, chosen.offload_activations)}
    for way in WAYS:
        with suppress(Exception):  # of the family's code in a dtype that it does not predict, as experts in float32
            needs[way.name] = predict_two_models(folder, way, max(1, rows // 2), length)
    found: dict[str, Any] = {
        "title": f"{model_name(model)}, recipe {chosen.name}: {rows} rows of {length} tokens a step, all used{note}",
        "ways": {name: dataclasses.asdict(need) for name, need in needs.items()},
    }
    if card is not None:
        options, fits = _fitting(folder, chosen, held, card, gpus)
        found |= {"options": options, "fits": fits and dataclasses.asdict(fits)}
    return found


def _held_by_full_step(folder: Path, recipe: Recipe, gpus: int) -> tuple[dict[str, int], int, int]:
    """`_held` of a recipe's largest step, on each of several GPUs. Raises NekoLeanError where the model's own code does
    not run on tensors without storage."""
    try:
        return _held(folder, recipe, _of_one(full_step(recipe), gpus), ranks=gpus)
    except NekoLeanError:
        raise
    except Exception as error:
        line = first_line(error)
        raise NekoLeanError(
            f"the memory of {folder} cannot be predicted: its code needs real tensors ({line})."
        ) from error


def _fitting(
    folder: Path, recipe: Recipe, held: tuple[dict[str, int], int, int], card: int, gpus: int
) -> tuple[list[str] | None, Need | None]:
    """The cheapest options, in flags, with which the recipe's largest step fits the card; and its need with them.
    `held` is what `_held` found for that step."""
    less = 512 if recipe.backward == "layerwise" else recipe.micro_tokens
    for positions in sorted({recipe.micro_tokens, min(less, recipe.micro_tokens)}, reverse=True):
        smaller = ["--set micro_tokens=512"] if positions < recipe.micro_tokens else []
        if smaller:
            changed = dataclasses.replace(recipe, micro_tokens=positions)
            held = _held_by_full_step(folder, changed, gpus)
        ways: list[list[str]] = [[], ["activations"], ["state"], ["state", "activations"]]
        if recipe.backward != "layerwise":  # no other keeps layer inputs apart
            ways = [[], ["state"]]
        for flags in ways:
            state, activations = (getattr(recipe, f"offload_{f}") or f in flags for f in ("state", "activations"))
            need = _need(*held, state, activations)
            if need.peak + CONTEXT <= card:
                flag = "--offload-{}" if forgets(recipe) else "--set offload_{}=true"  # memorize has no such flags
                return [flag.format(one) for one in flags] + smaller, need
    return None, None


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


def _step(lm: CausalLM, recipe: Recipe, ids: list[Tensor], index: list[Tensor], live: LiveTensors) -> int:
    """One step's allocations; returns the bytes of the layers' inputs that it keeps."""

    def complete(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            torch.empty(UPDATE_BYTES * min(SLICE, parameter.numel()), dtype=torch.uint8)
            parameter.grad = None

    walk, inputs = None, 0
    if recipe.backward == "layerwise":
        walk = LayerPass(lm, decoder_layers(lm))
        hidden = walk.forward(ids, index)
        inputs = sum(_bytes([call.hidden]) for calls in walk.calls for call in calls)
    else:
        if recipe.backward == "checkpointed":
            checkpoint_activations(lm.model)
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(complete)
        hidden = chosen_hidden(lm, ids, index)
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


def reset_peak(device: torch.device) -> None:
    """Start counting the peak afresh: the GPU's, and the process's where the system lets it be reset (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # 5 is the peak alone, see proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Give back what the allocator keeps of freed blocks, so that what is measured from here on is growth and not the
    reuse of leftovers. Only glibc can be asked."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of this process in memory now, mapped files among them; its peak so far where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory(torch.device("cpu"))["process"]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peaks in bytes since `reset_peak`: `process` (resident set), and on a GPU `allocated` and `reserved` by
    PyTorch."""
    peaks = {"process": _process_peak()}
    if device.type == "cuda":
        peaks["allocated"] = torch.cuda.max_memory_allocated(device)
        peaks["reserved"] = torch.cuda.max_memory_reserved(device)
    return peaks


def _process_peak() -> int:
    # Not ru_maxrss where there is another way: no reset reaches it, and on Linux a process begins with that of the
    # program which started it, so that a child of a large one would seem large itself.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
