"""Seconds that `neko-lean plan` takes for a model of 7 billion parameters, in a separate process.

    .venv/bin/python bench/plan.py --out bench-plan.json

Seconds are CPU time (user and system), which depends less on other work than the time on the clock. The imports of
torch and of a transformers model are measured by themselves, because a plan cannot take less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=4096, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip
GPUS = ("24GB", "12GB", "6GB")


def cpu_seconds(command: list[str]) -> float:
    """User and system seconds of a command with one thread. Raises CalledProcessError if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each command, of which the fastest counts")
    parser.add_argument("--out", type=Path, default=Path("bench-plan.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        CONFIG.save_pretrained(folder)
        plan = [sys.executable, "-m", "neko_lean", "plan", folder, "--quiet", "--gpu"]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "import a transformers model": [sys.executable, "-c", "from transformers import LlamaForCausalLM"],
            **{f"plan --gpu {gpu}": [*plan, gpu] for gpu in GPUS},
        }
        seconds = {name: min(cpu_seconds(words) for _ in range(options.runs)) for name, words in commands.items()}
    table = Table(title="CPU seconds of `neko-lean plan`, Llama-2-7B geometry", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}")
    Console(width=140).print(table)
    options.out.write_text(json.dumps(seconds, indent=1) + "\n")


if __name__ == "__main__":
    main()
