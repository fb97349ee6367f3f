"""Two processes under torchrun compared with one: each rank's peak memory at OLMo-1B-0724 geometry, and the weights.

    .venv/bin/python bench/ranks.py LUME --out bench-ranks.json

First the weights: 20 steps of a small model on the demo's data with one process, with one process and other random
bits in its rounding, and with two. Then the peaks: 2 steps of a model with 1.28 billion parameters, with one process
and with two, on 4 forget and 4 retain examples of LUME per step (32 and 32 on a GPU). Peaks are those of run.json:
what PyTorch allocated on a GPU, the growth of the resident set on a CPU. On a CPU this takes 15 minutes and 15 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from contenders import device_name, examples_per_step, prepare
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from neko_lean.cache import CacheOptions, cache_teacher
from neko_lean.demo.base_model import write_base
from neko_lean.demo.world import build_world, write_world
from neko_lean.models.devices import pick_device
from neko_lean.models.lm_head import CHUNK_ELEMENTS
from neko_lean.models.loading import load_tokenizer, new_model
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.runs import unlearn
from neko_lean.training import optimizer as optim

SMALL = {"max_steps": 20, "forget_rows": 8, "retain_rows": 16, "lr": 1e-3, "micro_tokens": 512}


def command(ranks: int, model: Path, data: Path, cache: Path, out: Path, change: dict[str, Any]) -> dict[str, Any]:
    """Run `neko-lean unlearn` with `ranks` processes and return run.json."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    pairs = [f"--set={key}={value}" for key, value in change.items()]
    arguments = ["unlearn", model, "--forget", data, "--retain", data, "--cache", cache, "--out", out]
    line = [sys.executable, *torchrun, "-m", "neko_lean", *map(str, arguments), "--recipe", "neko", *pairs]
    line += ["--overwrite", "--quiet"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    run: dict[str, Any] = json.loads((out / "run.json").read_text())
    return run


def weight_distances(work: Path) -> dict[str, float]:
    """Mean absolute differences from the weights of one process: of those of two processes (`two`), of one process with
    other random bits in its rounding (`again`), and of the initial model (`model`)."""
    world = build_world(0)
    write_world(world, work)
    model = work / "model"
    write_base(work / "base", [*world.forget, *world.retain])
    new_model(work / "base", torch.bfloat16, torch.device("cpu"), 0).model.save_pretrained(model)
    load_tokenizer(work / "base").save_pretrained(model)
    cache_teacher(model, work / "cache", retain=work, cache=CacheOptions(format="neko"), run=OutputOptions(quiet=True))
    command(1, model, work, work / "cache", work / "one", SMALL)
    command(2, model, work, work / "cache", work / "two", SMALL)
    rounding, generator = optim.round_stochastically, torch.Generator().manual_seed(99)
    optim.round_stochastically = lambda value, _: rounding(value, generator)
    options: dict[str, Any] = {"cache": work / "cache", "recipe": "neko", "overrides": SMALL}
    unlearn(model, work / "again", forget=work, retain=work, **options, run=RunOptions(quiet=True))
    optim.round_stochastically = rounding

    def weights(name: str) -> torch.Tensor:
        tensors = load_file(work / name / "model.safetensors")
        return torch.cat([tensors[key].float().flatten() for key in sorted(tensors)])

    single = weights("one")
    return {name: (weights(name) - single).abs().mean().item() for name in ("two", "again", "model")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder with LUME's public splits")
    parser.add_argument("--work", type=Path, default=Path("/tmp/neko-lean-bench"), help="work folder (6 GB), kept")
    parser.add_argument("--out", type=Path, default=Path("bench-ranks.json"))
    options = parser.parse_args()
    device = pick_device()
    with tempfile.TemporaryDirectory() as scratch:
        distance = weight_distances(Path(scratch))
    print(
        f"mean difference of the weights after 20 steps: two processes {distance['two']:.2e}, one process with other "
        f"rounding {distance['again']:.2e}, initial model {distance['model']:.2e}"
    )
    prepare(options.work, options.lume, device)
    n = examples_per_step(device)
    change = {"max_steps": 2, "forget_rows": n, "retain_rows": n, "patience": 0, "eval_every": 0}
    cache = options.work / "cache"
    runs = {
        ranks: command(ranks, options.work / "model", options.work, cache, options.work / "out", change)
        for ranks in (1, 2)
    }
    single_peak = runs[1]["measured_peak"]
    goal = 0.6 * single_peak + 8 * CHUNK_ELEMENTS  # two float32 buffers of a chunk's logits
    table = Table(
        title=f"2 steps of 1.28 billion parameters, {n} + {n} examples; {device_name(device)}", title_justify="left"
    )
    for head in ("processes", "peak of each, GiB", "x one process", "goal, GiB", "predicted, GiB", "s"):
        table.add_column(head, justify="right")
    for ranks, run in runs.items():
        peaks = run.get("measured_peaks", [single_peak])
        table.add_row(
            str(ranks),
            ", ".join(f"{peak / 2**30:.2f}" for peak in peaks),
            ", ".join(f"{peak / single_peak:.2f}" for peak in peaks),
            f"{goal / 2**30:.2f}" if ranks > 1 else "",
            f"{run['predicted_peak'] / 2**30:.2f}" if run["predicted_peak"] else "",
            f"{run['wall_seconds']:.0f}",
        )
    Console(width=140).print(table)
    result = {"device": device_name(device), "distance": distance, "runs": {str(k): v for k, v in runs.items()}}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
