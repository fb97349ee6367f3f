"""Kill training with SIGKILL at random moments, resume it, and compare weights and metrics with an unbroken run.

    .venv/bin/python bench/kill_training.py --trials 100 --out kill-training.json

Each trial is killed one to three times, each time at a random moment from before its first step to after its end, and
then left to end. The runs are small but differ in all that a resume has to bring back: three ways through the backward
pass, phases with an optimizer of their own, early stopping and a chosen checkpoint, levels that follow the anchor,
dropout. Needs Linux or macOS (fork). Each run is a child of a process that has the imports already.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kill import files, forked
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from neko_lean.cache import cache_teacher
from neko_lean.checkpoints import METRICS
from neko_lean.data import Row
from neko_lean.demo.run import write_base
from neko_lean.demo.world import build_world, write_world
from neko_lean.modeling import load_tokenizer, new_model
from neko_lean.recipes import load_recipe, reads_cache
from neko_lean.runs import memorize, unlearn
from neko_lean.unfinished import RUN

# What differs from run to run without a difference in what was computed.
TIMES = ("wait_seconds", "seconds", "peak_memory")
START = 0.25  # of a run's time: before that it loads
SMALL = {"lr": 1e-3, "forget_rows": 4, "retain_rows": 4, "max_length": 64, "eval_rows": 4}
LOOKS = {"max_steps": 24, "eval_every": 4, "choose": "quality", "patience": 3, "lr": 5e-3}
# Name: recipe, and what it changes.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "calibrated, layerwise, chosen by quality": ("calibrated", LOOKS),
    "sequential, plain, dropout, a phase a chunk": (
        "sequential",
        {"max_steps": 24, "chunk_rows": 16, "epochs": 2.0, "backward": "plain", "dropout": True},
    ),
    "alternating, checkpointed, early stopping": (
        "alternating",
        {"max_steps": 24, "eval_every": 4, "patience": 2, "backward": "checkpointed", "lr": 5e-3},
    ),
    "memorize, layerwise": ("memorize", {"max_steps": 24, "eval_every": 6}),
}


def make_world(root: Path) -> None:
    """Data, a model with random weights and dropout, an anchor and a teacher's cache."""
    world = build_world(0)
    write_world(world, root / "data")
    rows: list[Row] = [*world.forget, *world.retain]
    write_base(root / "model", rows, vocabulary=512)
    config = json.loads((root / "model" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "attention_dropout": 0.1}
    (root / "model" / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(root / "model")
    new_model(root / "model", torch.bfloat16, torch.device("cpu"), 0).model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    anchor = root / "data" / "anchor.jsonl"
    cache_teacher(root / "model", root / "data", root / "cache", anchor=anchor, max_length=64, quiet=True)


def run(root: Path, name: str, out: Path, resume: bool) -> None:
    """One run of a name, saved every third step."""
    recipe, change = RUNS[name]
    common: dict[str, Any] = {
        "recipe": recipe,
        "overrides": SMALL | change,
        "seed": 3,
        "save_every": 3,
        "resume": resume,
        "quiet": True,
    }
    data = root / "data"
    if recipe == "memorize":
        memorize(root / "model", data, out, **common)
        return
    cache = root / "cache" if reads_cache(load_recipe(recipe, SMALL | change), anchor=True) else None
    unlearn(root / "model", out, data, data, cache=cache, anchor=data / "anchor.jsonl", **common)


def result(out: Path) -> tuple[dict[str, str], list[dict[str, Any]], dict[str, Any]]:
    """What has to be the same: the checkpoint's files, the metrics but for times, how the run ended."""
    found = {name: digest for name, digest in files(out).items() if name not in (RUN, METRICS)}
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    told = json.loads((out / RUN).read_text())
    ends = {key: told[key] for key in ("steps", "weights_of_step", "ended", "padding", "made_from")}
    return found, [{k: v for k, v in line.items() if k not in TIMES} for line in lines], ends


def moment(out: Path) -> str:
    """When a run was killed, by what it left."""
    work = out.parent / f".{out.name}.saved"
    if not work.exists():
        return "behind its end" if out.exists() else "before anything"
    if out.exists():
        return "while clearing up"
    if (work / "output").exists():
        return "while writing the output"
    if any(work.glob(".step-*.tmp")):
        return "while saving"
    if any(work.glob(".best-*.tmp")):
        return "while keeping the best evaluation"
    return "between saves" if any(work.glob("step-*")) else "before the first save"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    disable_progress_bar()
    ends: dict[str, Counter[str]] = {name: Counter() for name in RUNS}
    moments: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        assert forked(lambda: make_world(root)) == 0
        wanted, length = {}, {}

        def once(name: str, out: Path, resume: bool) -> Callable[[], object]:
            return lambda: run(root, name, out, resume)

        for number, name in enumerate(RUNS):
            assert forked(once(name, root / f"whole{number}", False)) == 0
            start = time.monotonic()
            assert forked(once(name, root / f"again{number}", False)) == 0
            length[name] = time.monotonic() - start
            wanted[name] = result(root / f"whole{number}")
            assert result(root / f"again{number}") == wanted[name], f"{name} is not the same from run to run"
        for trial in range(options.trials):
            name = list(RUNS)[trial % len(RUNS)]
            out = root / f"trial{trial}"
            for kill in range(rng.randint(1, 3)):
                killed = forked(once(name, out, kill > 0), rng.uniform(START, 1.05) * length[name])
                ends[name]["kills" if killed else "ended before its kill"] += 1
                if killed:
                    moments[moment(out)] += 1
            status = forked(once(name, out, True))
            same = status == 0 and result(out) == wanted[name]
            ends[name]["bit-identical" if same else "DIFFERENT OR LOST"] += 1
            ends[name]["trials"] += 1
            ends[name]["left something behind"] += (out.parent / f".{out.name}.saved").exists()
            if not same:
                print(f"trial {trial} ({name}): the resume ended with {status}", file=sys.stderr)
    columns = ("trials", "kills", "bit-identical", "DIFFERENT OR LOST", "left something behind")
    table = Table("run", *columns, title=f"{sum(e['kills'] for e in ends.values())} kills")
    for name, counts in ends.items():
        table.add_row(name, *(str(counts[column]) for column in columns))
    Console(width=120).print(table)
    for when, count in moments.most_common():
        print(f"{count:5}  killed {when}")
    found = {
        "device": "CPU",
        "trials": options.trials,
        "runs": {
            name: {**counts, "seconds": length[name], "steps": wanted[name][2]["steps"]}
            for name, counts in ends.items()
        },
        "moments": dict(moments.most_common()),
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(sum(counts["bit-identical"] for counts in ends.values()) != options.trials)


if __name__ == "__main__":
    main()
