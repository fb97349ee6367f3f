"""Time of one step at OLMo-1B-0724 geometry: neko-lean against two models in memory; and of the head alone.

    .venv/bin/python bench/step.py ../shared/data/lume --out bench-step.json

The same real rows of LUME for every contender, 32 forget and 32 retain a step on a GPU, 4 and 4 on a CPU. Contenders
run in processes of their own, in turn, `--rounds` times; the table shows medians. Forward plus backward and the update
are timed apart, because bitsandbytes' 8-bit update is slow on a CPU.
The head: token_stats forward plus backward against materialised bfloat16 logits with torch's cross-entropy, 2048
rows, in turn.
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
    """Median seconds of the head's forward plus backward, both ways, for rows that need the target only."""
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
    ways: dict[str, Callable[[], torch.Tensor]] = {"token_stats": ours, "materialised": materialised}
    for number in range(rounds + 1):
        for name, way in ways.items():
            for leaf in leaves:
                leaf.grad = None
            start = clock(device)
            way().backward()
            spent = clock(device) - start
            if number:  # the first warms up
                seconds[name].append(spent)
    return {name: statistics.median(some) for name, some in seconds.items()}


def steps(work: Path, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Median seconds of forward plus backward and of the update, and real tokens a second, of each contender."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in names(device)}
    for _ in range(rounds):
        for name in seen:
            if not (seen[name] and seen[name][-1].get("out_of_memory")):
                seen[name].append(run(name, work, 2, device))
    found = {}
    for name, several in seen.items():
        if several[-1].get("out_of_memory"):
            found[name] = several[-1]
            continue
        speeds = [t / s for one in several for t, s in zip(one["tokens"], one["seconds"], strict=True)]
        found[name] = {
            "seconds": statistics.median(s for one in several for s in one["seconds"]),
            "tokens_per_second": statistics.median(speeds),
            "update_seconds": statistics.median(one["update_seconds"] for one in several),
            "all": several,
        }
    return found


def table(results: dict[str, dict[str, Any]], heading: str) -> Table:
    found = Table(title=heading, title_justify="left")
    for name in ("", "forward + backward s", "real tokens/s", "neko-lean's speed over it", "update s"):
        found.add_column(name, justify="left" if not name else "right")
    for name, one in results.items():
        if one.get("out_of_memory"):
            found.add_row(NAMES[name], "out of memory", "", "", "")
            continue
        ratio = results["lean"]["tokens_per_second"] / one["tokens_per_second"]
        cells = (one["seconds"], one["tokens_per_second"], ratio, one["update_seconds"])
        found.add_row(NAMES[name], *(f"{cell:.2f}" for cell in cells))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder of LUME's parquet files")
    parser.add_argument("--work", type=Path, default=Path("/tmp/neko-lean-bench"), help="3 GB of scratch, kept")
    parser.add_argument("--rounds", type=int, default=2, help="each gives two timed passes of every contender")
    parser.add_argument("--out", type=Path, default=Path("bench-step.json"))
    options = parser.parse_args()
    device = pick_device()
    prepare(options.work, options.lume, device)
    alone = head(device, 3)
    results = steps(options.work, options.rounds, device)
    Console(width=140).print(table(results, title(device)))
    ratio = alone["token_stats"] / alone["materialised"]
    print(
        f"Head, {ROWS} rows, forward + backward: token_stats {alone['token_stats']:.2f} s, materialised logits "
        f"{alone['materialised']:.2f} s: {ratio:.2f} x"
    )
    options.out.write_text(json.dumps({"title": title(device), "head": alone, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
