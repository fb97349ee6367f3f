"""Peak memory of one step at OLMo-1B-0724 geometry: neko-lean against two models in memory.

    .venv/bin/python bench/memory.py ../shared/data/lume --out bench-memory.json

Random weights, real rows of LUME: 32 forget and 32 retain a step on a GPU, 4 and 4 on a CPU. Each contender runs in a
process of its own. On a GPU the peak is what PyTorch allocated; on a CPU the resident set above that after imports,
sampled every 20 ms. A contender that does not fit is reported as such.

    .venv/bin/python bench/memory.py ../shared/data/lume --model CHECKPOINT --out bench-memory-model.json

Instead runs two steps of `unlearn` on a checkpoint of your own for each of several shapes, and prints what was measured
beside what was predicted: on a CPU the growth of the resident set, which should be within 20 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contenders import NAMES, device_name, names, prepare, run, title
from rich.console import Console
from rich.table import Table

from neko_lean.data.examples import read_rows
from neko_lean.jsonio import write_jsonl
from neko_lean.models.devices import pick_device
from neko_lean.models.loading import model_name

SHAPES = ((2, 4), (6, 12))  # forget and retain rows a step


def table(results: dict[str, dict[str, Any]], heading: str) -> Table:
    found = Table(title=heading, title_justify="left")
    for head in ("", "peak GiB", "x (weights + 8-bit state)", "x neko-lean", "predicted GiB"):
        found.add_column(head, justify="left" if not head else "right")
    ours = results["lean"]
    for name, one in results.items():
        more = "> " if one.get("out_of_memory") else ""
        found.add_row(
            NAMES[name] + (" (out of memory)" if more else ""),
            f"{more}{one['peak'] / 2**30:.2f}",
            f"{more}{one['peak'] / ours['floor']:.2f}",
            f"{more}{one['peak'] / ours['peak']:.2f}",
            f"{one['predicted'] / 2**30:.2f}" if "predicted" in one else "",
        )
    return found


def two_steps(model: Path, rows: Path, forget: int, retain: int, changes: list[str]) -> dict[str, Any]:
    """What run.json says of two steps of `graddiff`, which needs no teacher, in a process of its own."""
    values = [f"forget_rows={forget}", f"retain_rows={retain}", *changes]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "neko_lean",
            "unlearn",
            str(model),
            "--forget",
            str(rows),
            "--retain",
            str(rows),
        ]
        command += ["--out", f"{folder}/out", "--recipe", "graddiff", "--max-steps", "2", "--json", "--quiet"]
        command += [word for value in values for word in ("--set", value)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(values)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def of_model(model: Path, lume: Path, changes: list[str], heading: str) -> tuple[Table, list[dict[str, Any]]]:
    """Measured and predicted peaks for each dtype and shape of a step."""
    found = Table(title=heading, title_justify="left")
    for head in ("weights", "rows a step", "measured MiB", "predicted MiB", "predicted / measured"):
        found.add_column(head, justify="right")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder)
        for name in ("forget", "retain"):
            every = read_rows(lume, name, "train")
            write_jsonl(rows / f"{name}.jsonl", map(asdict, every[:: len(every) // 40][:40]))
        for dtype in ("bfloat16", "float32"):
            for forget, retain in SHAPES:
                run = two_steps(model, rows, forget, retain, [f"dtype={dtype}", *changes])
                measured, predicted = run["measured_peak"], run["predicted_peak"]
                results.append({"dtype": dtype, "forget_rows": forget, "retain_rows": retain, **run})
                found.add_row(
                    dtype,
                    f"{forget} + {retain}",
                    f"{measured / 2**20:.0f}",
                    f"{predicted / 2**20:.0f}",
                    f"{predicted / measured:.2f}",
                )
    return found, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder of LUME's parquet files")
    parser.add_argument("--work", type=Path, default=Path("/tmp/neko-lean-bench"), help="3 GB of scratch, kept")
    parser.add_argument("--out", type=Path, default=Path("bench-memory.json"))
    parser.add_argument("--model", type=Path, help="measure this checkpoint and compare with its prediction instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="with --model: of the recipe")
    options = parser.parse_args()
    device = pick_device()
    if options.model is not None:
        heading = f"Two steps of {model_name(options.model)}, rows of LUME; {device_name(device)}"
        found, results = of_model(options.model, options.lume, options.set, heading)
        Console(width=140).print(found)
        options.out.write_text(json.dumps({"title": heading, "runs": results}, indent=1) + "\n")
        return
    prepare(options.work, options.lume, device)
    results = {name: run(name, options.work, 0, device) for name in names(device)}
    Console(width=140).print(table(results, title(device)))
    options.out.write_text(json.dumps({"title": title(device), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
