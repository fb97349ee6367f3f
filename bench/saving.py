"""The cost of a save compared with a training step, in seconds and bytes, for two model sizes.

    .venv/bin/python bench/saving.py --out bench-saving.json

Random weights, 8 + 8 examples of the demo's data per step, a save after every step; medians. A save consists of 8-bit
Adam state, the trainable weights, and little else. Its time includes writing, syncing to disk, and reading back for
SHA-256.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from neko_lean.checkpoints.saves import METRICS
from neko_lean.demo.base_model import write_base
from neko_lean.demo.world import build_world, write_world
from neko_lean.models.loading import load_tokenizer, new_model
from neko_lean.options import RunOptions
from neko_lean.runs import unlearn
from neko_lean.training.adam_state import state_size
from neko_lean.training.checkpointing import Checkpointer
from neko_lean.training.optimizer import InBackwardAdam8bit

SIZES: dict[str, dict[str, int]] = {
    "the demo's": {},
    "middle": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
LARGE = 1_279_787_008  # parameters of OLMo-1B-0724
CHANGE = {"max_steps": 5, "forget_rows": 8, "retain_rows": 8, "max_length": 128}


def measure(root: Path, name: str) -> dict[str, Any]:
    """Measure one model size: parameters, bytes of a save, seconds of a step and of a save."""
    world = build_world(0)
    write_world(world, root / "data")
    base = root / name
    write_base(base, [*world.forget, *world.retain])
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SIZES[name]))
    tokenizer = load_tokenizer(base)
    model = new_model(base, torch.bfloat16, torch.device("cpu"), 0).model
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    seconds, sizes = [], []
    original = Checkpointer.save

    def timed(self: Checkpointer, optimizer: InBackwardAdam8bit) -> None:
        start = time.monotonic()
        original(self, optimizer)
        seconds.append(time.monotonic() - start)
        sizes.append(sum(file.stat().st_size for file in self.work.saves()[0].iterdir()))

    Checkpointer.save = timed  # type: ignore[method-assign]
    data, out = root / "data", root / f"{name} out"
    unlearn(
        base,
        out,
        forget=data,
        retain=data,
        recipe="graddiff",
        overrides=CHANGE,
        run=RunOptions(save_every=1, quiet=True),
    )
    Checkpointer.save = original  # type: ignore[method-assign]
    steps = [json.loads(line)["seconds"] for line in (out / METRICS).read_text().splitlines()]
    step, save = statistics.median(steps), statistics.median(seconds)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sizes[-1],
        "step_seconds": step,
        "save_seconds": save,
        "steps_a_save": save / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        results = {name: measure(Path(scratch) / name, name) for name in SIZES}
    table = Table("model", "parameters", "size of a save", "bytes per parameter", "step", "save", "save / step")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['parameters']:,}",
            f"{result['bytes'] / 1e6:.1f} MB",
            f"{result['bytes'] / result['parameters']:.2f}",
            f"{result['step_seconds']:.2f} s",
            f"{result['save_seconds']:.2f} s",
            f"{result['steps_a_save']:.2f}",
        )
    Console(width=120).print(table)
    large = 2 * LARGE + state_size(LARGE)
    print(f"OLMo-1B-0724, calculated: {large:,} bytes ({large / 2**30:.2f} GiB) per save")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
