"""Where the time of one step goes at OLMo-1B-0724 geometry, and how much of the device's peak FLOP/s it uses.

    .venv/bin/python bench/profile_step.py LUME --out bench-profile.json

The examples are those of bench/step.py: 32 forget and 32 retain of LUME per step on a GPU, 4 and 4 on a CPU. One step
warms up, one is timed by phase, and one runs under torch.profiler for the operators. Model FLOPs are those that the
mathematics of the step requires: real tokens, causal attention, the head only at positions that the loss uses.
Hardware FLOPs also include padding and the second forward pass of each layer and of the head. The peak is the GPU's
dense bfloat16 peak from a table. If it is not listed, or on a CPU, the peak is that of a large matmul in the same run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from contenders import clock, prepare, step_batches, step_examples, title
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from neko_lean.memory import GPUS
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.devices import pick_device
from neko_lean.models.loading import load_model
from neko_lean.recipe import Recipe, load_recipe
from neko_lean.training.batch import Batch
from neko_lean.training.determinism import deterministic
from neko_lean.training.layers import decoder_layers
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.losses import batch_losses
from neko_lean.training.optimizer import InBackwardAdam8bit

# Words of a card's name that do not change its peak.
MAKE = {"NVIDIA", "GeForce", "Tesla"}
FORMS = {"SXM4", "SXM5", "PCIE", "PCIe", "HBM3", "HBM3e", "40GB", "80GB"}
# Groups of operators by parts of their names; the first match counts.
GROUPS = {
    "8-bit update": ("bitsandbytes", "optimizer_update", "random", "bitwise", "index_select", "nan_to_num"),
    "attention": ("attention", "flash"),
    "matmul": ("mm", "matmul", "linear"),
    "norm, activation, softmax": ("norm", "silu", "gelu", "softmax", "logsumexp", "exp"),
    "elementwise": ("add", "mul", "div", "sub", "sqrt"),
    "copies and casts": ("copy", "to", "cat", "clone", "fill", "zero", "empty", "index", "gather", "scatter"),
}
PHASES = ("forward", "head", "backward of the layers", "update")


def flops(lm: CausalLM, layers: nn.ModuleList, lengths: Iterable[int], positions: int) -> dict[str, float]:
    """FLOPs of one forward pass: `layers`, the matmuls with the weights over `positions`, and `attention` over rows of
    these lengths, in which each token attends to itself and the tokens before it."""
    config = lm.model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    weights = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    return {"layers": 2.0 * weights * positions, "attention": 4.0 * width * len(layers) * pairs}


def step_flops(lm: CausalLM, layers: nn.ModuleList, batch: Batch, lengths: list[int]) -> dict[str, float]:
    """Model and hardware FLOPs of a step, and their parts. The backward of a matmul is two matmuls of the same size."""
    head = 2.0 * lm.head.numel() * len(batch.row)
    needed = sum(flops(lm, layers, lengths, batch.tokens).values())
    padded = [ids.shape[1] for ids in batch.micro.input_ids for _ in range(ids.shape[0])]
    computed = sum(flops(lm, layers, padded, batch.positions).values())
    parts = {"forward": needed, "backward": 2 * needed, "head": 3 * head}
    extra = {"padding": 3 * (computed - needed), "layers again": computed, "head again": head}
    model = sum(parts.values())
    return {"model": model, "hardware": model + sum(extra.values()), **parts, **extra}


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of ten matmuls of [4096, 4096] matrices ([2048, 2048] on a CPU)."""
    n = 4096 if device.type == "cuda" else 2048
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = clock(device)
        left @ right
        seconds.append(clock(device) - start)
    return 2 * n**3 / min(seconds)


def known_peak(device: torch.device) -> float | None:
    """The GPU's dense bfloat16 peak in FLOP/s from the table of cards, or None."""
    return card_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def card_peak(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a card by the name that torch reports, such as 'NVIDIA A100-SXM4-80GB'; None if unknown.

    A name with further words, such as Laptop or NVL, is another card.
    """
    words = set(re.split(r"[ -]", name)) - MAKE
    cards = [card for card in GPUS if set(card.name.split()) <= words]
    best = max(cards, key=lambda card: len(card.name.split()), default=None)
    return best.flops if best is not None and words <= set(best.name.split()) | FORMS else None


def take_step(
    walk: LayerPass, optimizer: InBackwardAdam8bit, batch: Batch, recipe: Recipe, device: torch.device
) -> dict[str, float]:
    """Seconds of each phase of one step. On a GPU, the host synchronises between phases."""
    seconds = dict.fromkeys(PHASES, 0.0)

    def update(parameter: nn.Parameter) -> None:
        start = clock(device)
        optimizer.update(parameter)
        seconds["update"] += clock(device) - start

    optimizer.begin_step(1e-5)
    marks = [clock(device)]
    hidden = walk.forward(batch.micro)
    marks.append(clock(device))
    batch_losses(hidden, walk.lm, batch, recipe)["loss"].backward()
    marks.append(clock(device))
    walk.backward(update)
    marks.append(clock(device))
    for phase, start, stop in zip(PHASES, marks[:-1], marks[1:], strict=False):
        seconds[phase] += stop - start
    seconds["backward of the layers"] -= seconds["update"]
    return seconds


def group(name: str) -> str:
    """The group of an operator, by its name."""
    return next((title for title, marks in GROUPS.items() if any(mark in name.lower() for mark in marks)), "other")


def operators(profiler: profile, device: torch.device) -> dict[str, float]:
    """Seconds that each operator spent itself, longest first. On a GPU, these are the seconds of the kernels that it
    launched, which the profiler also lists under their own names."""
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    on_host = (event for event in profiler.key_averages() if event.device_type == DeviceType.CPU)
    seconds = {event.key: getattr(event, own) / 1e6 for event in on_host}
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def grouped(by_operator: dict[str, float]) -> dict[str, float]:
    """Seconds by group of operators, longest first."""
    by_group: dict[str, float] = defaultdict(float)
    for name, seconds in by_operator.items():
        by_group[group(name)] += seconds
    return dict(sorted(by_group.items(), key=lambda pair: -pair[1]))


def table(result: dict[str, Any]) -> Table:
    rows = Table(title=result["title"], title_justify="left")
    for column in ("", "seconds", "share"):
        rows.add_column(column, justify="right" if column else "left")
    for heading in ("phases", "operators"):
        total = sum(result[heading].values())
        for name, seconds in result[heading].items():
            rows.add_row(name, f"{seconds:.2f}", f"{seconds / total:.1%}")
        rows.add_row(f"all {heading}", f"{total:.2f}", "", end_section=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder with LUME's public splits")
    parser.add_argument("--work", type=Path, default=Path("/tmp/neko-lean-bench"), help="work folder (3 GB), kept")
    parser.add_argument("--out", type=Path, default=Path("bench-profile.json"))
    options = parser.parse_args()
    device = pick_device()
    prepare(options.work, options.lume, device)
    recipe = load_recipe("neko")
    lm = load_model(options.work / "model", torch.bfloat16, device)
    lm.model.eval()
    batches = step_batches(options.work, recipe, device)
    layers = decoder_layers(lm)
    walk = LayerPass(lm, layers)
    optimizer = InBackwardAdam8bit(lm.model.named_parameters())
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with deterministic(device):  # as `unlearn` does
        take_step(walk, optimizer, batches[0], recipe, device)
        phases = take_step(walk, optimizer, batches[1], recipe, device)
        with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
            take_step(walk, optimizer, batches[2], recipe, device)
    by_operator = operators(profiler, device)
    forget, retain = step_examples(options.work, device)[1]
    lengths = [len(example) for example in [*forget, *retain]]
    counted = step_flops(lm, layers, batches[1], lengths)
    peak = known_peak(device) or measured_peak(device, torch.bfloat16)
    seconds = {"with": sum(phases.values()), "without": sum(phases.values()) - phases["update"]}
    result = {
        "title": title(device),
        "phases": phases,
        "operators": grouped(by_operator),
        "largest operators": dict(list(by_operator.items())[:30]),
        "flops": counted,
        "peak": peak,
        "peak_is": "from a table" if known_peak(device) else "measured",
        "tokens": batches[1].tokens,
        "positions": batches[1].positions,
        "head_positions": len(batches[1].row),
        "used": {
            f"{kind}, {how} update": counted[kind] / s / peak
            for kind in ("model", "hardware")
            for how, s in seconds.items()
        },
    }
    Console(width=140).print(table(result))
    print(
        f"{result['tokens']} tokens, {result['positions']} positions with padding, {result['head_positions']} at the "
        f"head; model {counted['model'] / 1e12:.2f} TFLOP, hardware {counted['hardware'] / 1e12:.2f}; peak "
        f"{peak / 1e12:.2f} TFLOP/s ({result['peak_is']})"
    )
    print("utilisation: " + "; ".join(f"{name} {share:.1%}" for name, share in result["used"].items()))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
