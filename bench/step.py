"""Time of one step at OLMo-1B-0724 geometry: neko-lean compared with two models in memory; and of the head alone.

    .venv/bin/python bench/step.py LUME --out bench-step.json

Every contender uses the same LUME examples: 32 forget and 32 retain per step on a GPU, 4 and 4 on a CPU. Contenders
run in separate processes, in turn, `--rounds` times; the table shows medians. Forward + backward and the update are
timed separately, because the 8-bit update does not depend on the examples. For the head, token_stats (forward +
backward) is compared with materialised bfloat16 logits and torch's cross-entropy, on 2048 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contenders import NAMES, clock, names, prepare, run, title
from rich.console import Console
from rich.table import Table

from neko_lean.models.chunked_head import token_stats
from neko_lean.models.devices import pick_device

ROWS, WIDTH, VOCABULARY = 2048, 2048, 50304


def head(device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of the head's forward and backward pass with both methods, without a teacher."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    hidden, weight = random(ROWS, WIDTH), random(VOCABULARY, WIDTH) * 0.02
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator, device=device)
    leaves = [hidden.requires_grad_(), weight.detach().requires_grad_()]

    def ours() -> torch.Tensor:
        return -token_stats(*leaves, target)[0].mean()

    def materialised() -> torch.Tensor:
        return F.cross_entropy((leaves[0] @ leaves[1].T).float(), target)

    seconds: dict[str, list[float]] = {"token_stats": [], "materialised": []}
    methods: dict[str, Callable[[], torch.Tensor]] = {"token_stats": ours, "materialised": materialised}
    for number in range(rounds + 1):
        for name, method in methods.items():
            for leaf in leaves:
                leaf.grad = None
            start = clock(device)
            method().backward()
            spent = clock(device) - start
            if number:  # the first round warms up
                seconds[name].append(spent)
    return {name: statistics.median(times) for name, times in seconds.items()}


def steps(work: Path, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Median seconds of forward + backward and of the update, and real tokens per second, of each contender."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names(device)}
    for _ in range(rounds):
        for name in runs:
            if not (runs[name] and runs[name][-1].get("out_of_memory")):
                runs[name].append(run(name, work, 2, device))
    medians = {}
    for name, results in runs.items():
        if results[-1].get("out_of_memory"):
            medians[name] = results[-1]
            continue
        speeds = [t / s for result in results for t, s in zip(result["tokens"], result["seconds"], strict=True)]
        medians[name] = {
            "seconds": statistics.median(s for result in results for s in result["seconds"]),
            "tokens_per_second": statistics.median(speeds),
            "update_seconds": statistics.median(result["update_seconds"] for result in results),
            "all": results,
        }
    return medians


def table(results: dict[str, dict[str, Any]], heading: str) -> Table:
    rows = Table(title=heading, title_justify="left")
    for name in ("", "forward + backward s", "real tokens/s", "neko-lean's speed-up", "update s"):
        rows.add_column(name, justify="left" if not name else "right")
    for name, result in results.items():
        if result.get("out_of_memory"):
            rows.add_row(NAMES[name], "out of memory", "", "", "")
            continue
        ratio = results["lean"]["tokens_per_second"] / result["tokens_per_second"]
        cells = (result["seconds"], result["tokens_per_second"], ratio, result["update_seconds"])
        rows.add_row(NAMES[name], *(f"{cell:.2f}" for cell in cells))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder with LUME's public splits")
    parser.add_argument("--work", type=Path, default=Path("/tmp/neko-lean-bench"), help="work folder (3 GB), kept")
    parser.add_argument("--rounds", type=int, default=2, help="each times two passes of every contender")
    parser.add_argument("--out", type=Path, default=Path("bench-step.json"))
    options = parser.parse_args()
    device = pick_device()
    prepare(options.work, options.lume, device)
    head_seconds = head(device, 3)
    results = steps(options.work, options.rounds, device)
    Console(width=140).print(table(results, title(device)))
    ratio = head_seconds["token_stats"] / head_seconds["materialised"]
    print(
        f"Head, {ROWS} tokens, forward + backward: token_stats {head_seconds['token_stats']:.2f} s, "
        f"materialised logits {head_seconds['materialised']:.2f} s: {ratio:.2f} x"
    )
    options.out.write_text(json.dumps({"title": title(device), "head": head_seconds, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
