"""Peak memory of one step at OLMo-1B-0724 geometry: neko-lean against two models in memory.

    .venv/bin/python bench/memory.py ../shared/data/lume --out bench-memory.json

Random weights, real rows of LUME: 32 forget and 32 retain a step on a GPU, 4 and 4 on a CPU. Each contender runs in a
process of its own. On a GPU the peak is what PyTorch allocated; on a CPU the resident set above that after imports,
sampled every 20 ms. A contender that does not fit is reported as such.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from contenders import NAMES, names, prepare, run, title
from rich.console import Console
from rich.table import Table

from neko_lean.modeling import pick_device


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder of LUME's parquet files")
    parser.add_argument("--work", type=Path, default=Path("/tmp/neko-lean-bench"), help="3 GB of scratch, kept")
    parser.add_argument("--out", type=Path, default=Path("bench-memory.json"))
    options = parser.parse_args()
    device = pick_device()
    prepare(options.work, options.lume, device)
    results = {name: run(name, options.work, 0, device) for name in names(device)}
    Console(width=140).print(table(results, title(device)))
    options.out.write_text(json.dumps({"title": title(device), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
