"""What a run will need, before it runs, and what it did need, after.

The prediction runs the step's own code on fake tensors (shapes without storage) and counts what is alive, so it knows
no architecture and cannot drift from the code. It takes a config, no weights.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neko_lean.families import backbone_of
from neko_lean.head import CHUNK_ELEMENTS
from neko_lean.layerwise import LayerPass, decoder_layers, freeze
from neko_lean.modeling import CausalLM, checkpoint_activations, load_config, model_folder, model_name
from neko_lean.optim import SLICE, UPDATE_BYTES, state_size
from neko_lean.ranks import size
from neko_lean.recipes import Recipe, forgets, load_recipe
from neko_lean.step import chosen_hidden, dealt
from neko_lean.twomodels import WAYS, Way, two_model_loss

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CHUNK_BYTES = 8  # of a logit of a chunk: itself in float32, and one buffer of its size
CONTEXT = 600 * 2**20  # what CUDA and its libraries take of a card beside tensors


@dataclass(frozen=True)
class Need:
    """Bytes that a step holds, wherever they lie (`lines`), and peaks at."""

    lines: dict[str, int]
    peak: int  # on the device
    host: int  # in host memory, where something was sent there

    def on(self, device: torch.device) -> int:
        """The peak in the memory that `device` has: on a CPU the host's is the same."""
        return self.peak + (self.host if device.type == "cpu" else 0)


class LiveTensors(TorchDispatchMode):
    """Within `with LiveTensors() as live:` counts the storages that operators create, until each is freed.

    `live.now` and `live.peak` are bytes, `live.largest` those of the largest storage. Works on fake tensors too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.largest = 0
        self._alive: dict[int, int] = {}

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
                weakref.finalize(storage, self._freed, _key(one))
        return out

    def _freed(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


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
    lines, movable = _held(config, recipe, micro, wanted, ranks)
    return _need(lines, movable, recipe.offload_state, recipe.offload_activations)


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
) -> tuple[dict[str, int], int]:
    """A step's `lines` with everything on the device, and how many bytes of layer inputs could leave it."""
    with FakeTensorMode():
        lm = fake_model(config, getattr(torch, recipe.dtype))
        freeze(lm, recipe.train_last, recipe.train_only)
        learning = [p for p in lm.model.parameters() if p.requires_grad]
        ids = [torch.zeros(shape, dtype=torch.int64) for shape in micro]
        index = [torch.zeros(n, dtype=torch.int64) for n in wanted or [rows * length for rows, length in micro]]
        with LiveTensors() as live:
            inputs = _step(lm, recipe, ids, index)
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
    return lines, max(0, inputs - 2 * widest)


def _gathered(lm: CausalLM) -> int:
    """Bytes that a rank has gathered of others when it needs most: embeddings, norm and head while the losses go back
    through the head, or then a layer, which FSDP receives in one piece and copies into its parameters."""
    layers = [_bytes(layer.parameters()) for layer in decoder_layers(lm)]
    return max(_bytes(lm.model.parameters()) - sum(layers), 2 * max(layers))


def _need(lines: dict[str, int], movable: int, offload_state: bool, offload_activations: bool) -> Need:
    host = (lines["Adam state"] if offload_state else 0) + (movable if offload_activations else 0)
    kept = ("student weights", "Adam state", "gathered from other ranks", "peak of all but weights and state")
    together = sum(lines.get(name, 0) for name in kept)
    return Need(lines, together - host, host)


def predict_two_models(config: Path, way: Way, rows: int, length: int) -> Need:
    """What one step of the two-model way needs, with `rows` rows of `length` tokens of each set; on a GPU."""
    shape = (rows, way.max_length or length)
    with FakeTensorMode():
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
    micro = full_step(chosen)
    length = micro[0][1]
    rows = sum(one[0] for one in micro)
    held = _held(folder, chosen, _of_one(micro, gpus), ranks=gpus)
    needs = {"neko-lean": _need(*held, chosen.offload_state, chosen.offload_activations)}
    for way in WAYS:
        needs[way.name] = predict_two_models(folder, way, max(1, rows // 2), length)
    found: dict[str, Any] = {
        "title": f"{model_name(model)}, recipe {chosen.name}: {rows} rows of {length} tokens a step, all used",
        "ways": {name: dataclasses.asdict(need) for name, need in needs.items()},
    }
    if card is not None:
        options, fits = _fitting(folder, chosen, held, card, gpus)
        found |= {"options": options, "fits": fits and dataclasses.asdict(fits)}
    return found


def _fitting(
    folder: Path, recipe: Recipe, held: tuple[dict[str, int], int], card: int, gpus: int
) -> tuple[list[str] | None, Need | None]:
    """The cheapest options, in flags, with which the recipe's largest step fits the card; and its need with them.
    `held` is what `_held` found for that step."""
    less = 512 if recipe.backward == "layerwise" else recipe.micro_tokens
    for positions in sorted({recipe.micro_tokens, min(less, recipe.micro_tokens)}, reverse=True):
        smaller = ["--set micro_tokens=512"] if positions < recipe.micro_tokens else []
        if smaller:
            changed = dataclasses.replace(recipe, micro_tokens=positions)
            held = _held(folder, changed, _of_one(full_step(changed), gpus), ranks=gpus)
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


def fake_model(config: Path | PreTrainedConfig, dtype: torch.dtype) -> CausalLM:
    """A model without storage from its config; under FakeTensorMode only."""
    from transformers import AutoModelForCausalLM

    shape = load_config(config) if isinstance(config, Path) else config
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=False).eval()
    return CausalLM(model, backbone_of(model))


def _step(lm: CausalLM, recipe: Recipe, ids: list[Tensor], index: list[Tensor]) -> int:
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
    torch.empty(_chunk_bytes(lm, len(hidden)), dtype=torch.uint8)
    if head is not lm.embedding and walk is None:
        complete(head)
    torch.autograd.backward(hidden, slope)
    del hidden, slope
    if walk is not None:
        walk.backward(complete)
    return inputs


def _chunk_bytes(lm: CausalLM, positions: int) -> int:
    return CHUNK_BYTES * min(CHUNK_ELEMENTS, positions * lm.head.shape[0])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def reset_peak(device: torch.device) -> None:
    """Start counting the GPU's peak afresh; a process's own peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def resident() -> int:
    """Bytes of this process in memory now; its peak so far where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory(torch.device("cpu"))["process"]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peaks in bytes: `process` (resident set), and on a GPU `allocated` and `reserved` by PyTorch."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB but on macOS
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peaks["allocated"] = torch.cuda.max_memory_allocated(device)
        peaks["reserved"] = torch.cuda.max_memory_reserved(device)
    return peaks
