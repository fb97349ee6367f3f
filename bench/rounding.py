"""Does bfloat16 with stochastic rounding train as well as float32? The same recipe and seed with three optimizers.

    neko-lean demo --out demo-run
    .venv/bin/python bench/rounding.py demo-run --steps 200 --out bench-rounding.json

1. bfloat16 weights, 8-bit Adam, stochastic rounding: what `unlearn` does.
2. float32 weights and torch's AdamW with float32 state, from the same bfloat16 checkpoint converted to float32.
3. The same as 1, but rounded to nearest.

Losses are those of the last evaluation, over all examples of both sets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import neko_lean
from neko_lean.cache import CacheOptions
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.training import optimizer as optim
from neko_lean.training import trainer

NAMES = {
    "stochastic": "bfloat16, 8-bit Adam, stochastic rounding",
    "float32": "float32, torch's AdamW",
    "nearest": "bfloat16, 8-bit Adam, round to nearest",
}


class Float32AdamW:
    """torch's AdamW, one parameter at a time, with the interface that the trainer expects of an optimizer."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], **options: Any) -> None:
        settings = {key: options[key] for key in ("betas", "eps", "weight_decay")}
        self.optimizers = {p: torch.optim.AdamW([p], **settings) for _, p in named if p.requires_grad}
        self.lr = 0.0

    def attach(self) -> None:
        for p in self.optimizers:
            p.register_post_accumulate_grad_hook(self.update)

    def close(self) -> None:
        pass

    def begin_step(self, lr: float) -> None:
        self.lr = lr

    def update(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return
        optimizer = self.optimizers[parameter]
        optimizer.param_groups[0]["lr"] = self.lr
        optimizer.step()
        parameter.grad = None


def nearest(value: Tensor, generator: torch.Generator) -> Tensor:
    return value.bfloat16()


def run(name: str, folder: Path, cache: Path, steps: int, seed: int) -> dict[str, float]:
    originals = trainer.InBackwardAdam8bit, optim.round_stochastically
    change: dict[str, Any] = {"max_steps": steps, "eval_every": steps, "eval_rows": 10**6, "patience": 0}
    if name == "float32":
        trainer.InBackwardAdam8bit = Float32AdamW  # type: ignore[misc,assignment]
        change["dtype"] = "float32"
    elif name == "nearest":
        optim.round_stochastically = nearest
    try:
        with tempfile.TemporaryDirectory() as scratch:
            neko_lean.unlearn(
                folder / "target",
                Path(scratch) / "out",
                forget=folder / "data",
                retain=folder / "data",
                cache=cache,
                recipe="neko",
                overrides=change,
                run=RunOptions(seed=seed, quiet=True),
            )
            lines = (Path(scratch) / "out" / "metrics.jsonl").read_text().splitlines()
    finally:
        trainer.InBackwardAdam8bit, optim.round_stochastically = originals  # type: ignore[misc]
    last = json.loads(lines[-1])
    return {"forget_loss": last["eval_forget_loss"], "retain_kl": last["eval_retain_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of `neko-lean demo`")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench-rounding.json"))
    options = parser.parse_args()
    seeds = range(options.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "teacher"
        neko_lean.cache_teacher(
            options.run / "target",
            cache,
            retain=options.run / "data",
            cache=CacheOptions(max_length=128, format="neko"),
            run=OutputOptions(quiet=True),
        )
        results = {name: [run(name, options.run, cache, options.steps, seed) for seed in seeds] for name in NAMES}
    table = Table(title=f"recipe neko, {options.steps} steps, {options.seeds} seeds; CPU", title_justify="left")
    for head in ("", "forget loss", "x float32", "retain KL", "x float32"):
        table.add_column(head, justify="left" if not head else "right")
    for name, runs in results.items():
        cells = []
        for key in ("forget_loss", "retain_kl"):
            value = statistics.median(run[key] for run in runs)
            ratio = statistics.median(a[key] / b[key] for a, b in zip(runs, results["float32"], strict=True))
            cells += [f"{value:.4f}", f"{ratio:.3f}"]
        table.add_row(NAMES[name], *cells)
    Console(width=140).print(table)
    options.out.write_text(json.dumps({"steps": options.steps, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
