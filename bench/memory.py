"""Peak memory of one step at OLMo-1B-0724 geometry: neko-lean compared with two models in memory.

    .venv/bin/python bench/memory.py LUME --out bench-memory.json

Random weights, LUME examples: 32 forget and 32 retain per step on a GPU, 4 and 4 on a CPU. Each contender runs in a
separate process. On a GPU, the peak is what PyTorch allocated; on a CPU, the growth of the resident set since the
imports, sampled every 20 ms. A contender that does not fit is reported as out of memory.

    .venv/bin/python bench/memory.py LUME --model CHECKPOINT --out bench-memory-model.json

This runs two steps of `unlearn` on your own checkpoint instead, for each of several shapes, and prints measured and
predicted peaks. On a CPU, the peak is the growth of the resident set; the prediction should be within 20 % of it.
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

SHAPES = ((2, 4), (6, 12))  # forget and retain examples per step


def table(results: dict[str, dict[str, Any]], heading: str) -> Table:
    rows = Table(title=heading, title_justify="left")
    for head in ("", "peak GiB", "x (weights + 8-bit state)", "x neko-lean", "predicted GiB"):
        rows.add_column(head, justify="left" if not head else "right")
    ours = results["lean"]
    for name, result in results.items():
        above = "> " if result.get("out_of_memory") else ""
        rows.add_row(
            NAMES[name] + (" (out of memory)" if above else ""),
            f"{above}{result['peak'] / 2**30:.2f}",
            f"{above}{result['peak'] / ours['floor']:.2f}",
            f"{above}{result['peak'] / ours['peak']:.2f}",
            f"{result['predicted'] / 2**30:.2f}" if "predicted" in result else "",
        )
    return rows


def two_steps(model: Path, rows: Path, forget: int, retain: int, changes: list[str]) -> dict[str, Any]:
    """Run two steps of `graddiff`, which needs no teacher, in a separate process and return run.json."""
    values = [f"forget_rows={forget}", f"retain_rows={retain}", *changes]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "neko_lean", "unlearn", str(model)]
        command += ["--forget", str(rows), "--retain", str(rows)]
        command += ["--out", f"{folder}/out", "--recipe", "graddiff", "--max-steps", "2", "--json", "--quiet"]
        command += [word for value in values for word in ("--set", value)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(values)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check_predictions(model: Path, lume: Path, changes: list[str], heading: str) -> tuple[Table, list[dict[str, Any]]]:
    """Measured and predicted peaks for each dtype and shape of a step."""
    rows = Table(title=heading, title_justify="left")
    for head in ("weights", "examples per step", "measured MiB", "predicted MiB", "predicted / measured"):
        rows.add_column(head, justify="right")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        for name in ("forget", "retain"):
            examples = read_rows(lume, name, "train")
            write_jsonl(data / f"{name}.jsonl", map(asdict, examples[:: len(examples) // 40][:40]))
        for dtype in ("bfloat16", "float32"):
            for forget, retain in SHAPES:
                run = two_steps(model, data, forget, retain, [f"dtype={dtype}", *changes])
                measured, predicted = run["measured_peak"], run["predicted_peak"]
                results.append({"dtype": dtype, "forget_rows": forget, "retain_rows": retain, **run})
                rows.add_row(
                    dtype,
                    f"{forget} + {retain}",
                    f"{measured / 2**20:.0f}",
                    f"{predicted / 2**20:.0f}",
                    f"{predicted / measured:.2f}",
                )
    return rows, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder with LUME's public splits")
    parser.add_argument("--work", type=Path, default=Path("/tmp/neko-lean-bench"), help="work folder (3 GB), kept")
    parser.add_argument("--out", type=Path, default=Path("bench-memory.json"))
    parser.add_argument(
        "--model", type=Path, help="compare the measured and predicted peaks of this checkpoint instead"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="with --model: a recipe value; repeatable"
    )
    options = parser.parse_args()
    device = pick_device()
    if options.model is not None:
        heading = f"Two steps of {model_name(options.model)}, LUME examples; {device_name(device)}"
        rows, results = check_predictions(options.model, options.lume, options.set, heading)
        Console(width=140).print(rows)
        options.out.write_text(json.dumps({"title": heading, "runs": results}, indent=1) + "\n")
        return
    prepare(options.work, options.lume, device)
    results = {name: run(name, options.work, 0, device) for name in names(device)}
    Console(width=140).print(table(results, title(device)))
    options.out.write_text(json.dumps({"title": title(device), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
