"""The tables of bench/quality.py: one row per recipe, medians over seeds."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from neko_lean.data.examples import TASKS
from neko_lean.scoring.task import CELLS

OTHER_ATTACKS = ("zlib", "min_k", "min_k_plus_plus")


def table(root: Path, names: list[str], seeds: list[int]) -> list[str]:
    """One row per recipe: the median over seeds, with the range if seeds differ."""
    results = {
        name: [json.loads(p.read_text()) for seed in seeds if (p := root / f"seed-{seed}" / f"{name}.json").is_file()]
        for name in ["target", *names]
    }
    before = {run["seed"]: run for run in results["target"]}
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in results.items():
        if runs:
            cells = [spread([value(run, before[run["seed"]]) for run in runs]) for _, value in COLUMNS]
            lines.append(f"| {'do nothing' if name == 'target' else name} | {' | '.join(cells)} |")
    lines += ["", "| | " + " | ".join(cell.replace(".", " ") for cell in CELLS) + " |", "|---" * 13 + "|"]
    for name, runs in results.items():
        if runs:
            cells = [f"{statistics.median(run['cells'][cell] for run in runs):.2f}" for cell in CELLS]
            lines.append(f"| {'do nothing' if name == 'target' else name} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float]) -> str:
    """Median and range as text."""
    middle = statistics.median(values)
    digits = 0 if abs(middle) >= 100 else 2 if abs(middle) >= 10 else 3
    shown = [f"{value:.{digits}f}" for value in (middle, min(values), max(values))]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"


def recovered(run: dict[str, Any], steps: int) -> float:
    """Mean of regurgitation and knowledge on the other forget examples after relearning some; NaN if not measured."""
    point = relearned(run, steps)
    return statistics.mean([point["regurgitation"], point["knowledge"]]) if point else math.nan


def answer_nll(run: dict[str, Any], steps: int) -> float:
    """Loss of the answers of the other forget examples, in nats a token."""
    return float(relearned(run, steps).get("answer_nll", math.nan))


def relearned(run: dict[str, Any], steps: int) -> dict[str, Any]:
    """The point of the relearning attack after a number of steps; empty if it was not measured."""
    return next((point for point in run["relearn"] if point["steps"] == steps), {})


COLUMNS: list[tuple[str, Any]] = [
    ("task aggregate", lambda run, before: run["aggregate"]),
    ("membership AUC", lambda run, before: run["auc"]),
    *((f"AUC of {name}", lambda run, before, name=name: run["attacks"][name]) for name in OTHER_ATTACKS),
    ("membership score", lambda run, before: run["membership"]),
    *((f"AUC {task}", lambda run, before, task=task: run[f"auc_{task}"]) for task in TASKS),
    ("largest tell", lambda run, before: max(run["tell"], *(run[f"tell_{task}"] for task in TASKS))),
    ("intervals with 0.5", lambda run, before: sum(
        low <= 0.5 <= high for low, high in [run["interval"], *(run[f"interval_{task}"] for task in TASKS)]
    )),
    ("retain exact, change", lambda run, before: run["retain_exact"] - before["retain_exact"]),
    ("retain perplexity", lambda run, before: float(np.exp(min(run["retain_nll"], 50)))),
    ("held-out NLL", lambda run, before: run["held_nll"]),
    ("held-out NLL, change %", lambda run, before: 100 * (run["held_nll"] / before["held_nll"] - 1)),
    ("degenerate", lambda run, before: run["degenerate"]),
    ("repetition", lambda run, before: run["repetition"]),
    *((f"recovered, {steps} steps", lambda run, before, steps=steps: recovered(run, steps)) for steps in (0, 5, 40)),
    *((f"answer NLL, {steps} steps", lambda run, before, steps=steps: answer_nll(run, steps)) for steps in (0, 5)),
    ("KL from gold", lambda run, before: run["gold_kl"]),
    ("KS p", lambda run, before: run["ks_p"]),
    ("seconds", lambda run, before: run["seconds"]),
    ("peak GiB", lambda run, before: run["peak"] / 2**30),
]  # fmt: skip
