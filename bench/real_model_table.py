"""The table of bench/real_model.py: one row per model, medians over seeds, and five forget prompts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Scores = dict[str, Any]
Column = tuple[str, Callable[[Scores, Scores, Scores], float | None]]
PROMPTS = 5
MISSING = "-"


def table(root: Path, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Lines of Markdown. Values that were not measured are shown as a dash, and columns without any are left out."""
    rows = {}
    for name in names:
        runs = [run for seed in seeds if (run := _scored_run(root, seed, name)) is not None]
        if runs:
            rows[name] = [_median(column, runs) for _, column in COLUMNS]
    known = [number for number in range(len(COLUMNS)) if any(cells[number] != MISSING for cells in rows.values())]
    lines = ["| | " + " | ".join(COLUMNS[number][0] for number in known) + " |", "|---" + "|--:" * len(known) + "|"]
    lines += [f"| {name} | " + " | ".join(cells[number] for number in known) + " |" for name, cells in rows.items()]
    return [*lines, "", *_answers(root, names, seeds[0])]


def _scored_run(root: Path, seed: int, name: str) -> tuple[Scores, Scores, Scores] | None:
    """Scores of a model, those of the target with the same seed, and the model's run.json; None without scores."""
    scores, target = _scores(root, seed, name), _scores(root, seed, "target")
    return None if scores is None or target is None else (scores, target, _run(root, seed, name))


def _median(column: Any, runs: Sequence[tuple[Scores, Scores, Scores]]) -> str:
    values = [column(*run) for run in runs]
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3f}" if known else MISSING


def _answers(root: Path, names: Sequence[str], seed: int) -> list[str]:
    """What each model says to the same forget prompts."""
    said: dict[str, dict[str, Any]] = {}
    for name in names:
        file = root / f"seed-{seed}" / f"{name}-scores" / "generations.jsonl"
        if file.is_file():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            said[name] = {row["id"]: row for row in rows if row["split"] == "forget"}
    if not said:
        return []
    rows = list(said[next(iter(said))].values())
    lines = []
    for row in rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]:
        lines += [f"**{_short(row['input'][-150:])}**", "", f"- true answer: {_short(row['output'])}"]
        lines += [f"- {name}: {_short(by_id[row['id']]['generation'])}" for name, by_id in said.items()]
        lines.append("")
    return lines


def _short(text: str) -> str:
    return " ".join(text.split())[:150]


def _scores(root: Path, seed: int, name: str) -> Scores | None:
    file = root / f"seed-{seed}" / f"{name}-scores" / "scores.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _run(root: Path, seed: int, name: str) -> Scores:
    run: Scores = json.loads((root / f"seed-{seed}" / name / "run.json").read_text())
    return run


def _forget(scores: Scores, kind: str) -> float:
    return max(value for cell, value in scores["cells"].items() if cell.startswith("forget") and cell.endswith(kind))


def _retain_change(scores: Scores, target: Scores, _: Scores) -> float:
    cells = [cell for cell in scores["cells"] if cell.startswith("retain")]
    return min(float(scores["cells"][cell] - target["cells"][cell]) for cell in cells)


def _strongest(scores: Scores, statistic: str) -> float | None:
    if not scores["membership"]:
        return None
    attacks = scores["membership"]["attacks"]["all"].values()
    return max(float(attack[statistic]) for attack in attacks if attack)


def _mmlu(scores: Scores, _: Scores, __: Scores) -> float | None:
    return scores["mmlu"]["micro"] if scores["mmlu"] else None


def _benchmark(scores: Scores, key: str) -> float | None:
    return scores["benchmark"][key] if scores["benchmark"] else None


def _attacked(scores: Scores, attack: str, key: str, x: int, value: str) -> float | None:
    """A value of an attack's point at `x`; None if it was not measured."""
    points = scores["attacks"].get(attack, [])
    return next((point[value] for point in points if point[key] == x), None)


COLUMNS: list[Column] = [
    ("task aggregate", lambda scores, target, run: scores["task_aggregate"]),
    ("highest forget knowledge", lambda scores, target, run: _forget(scores, "knowledge")),
    ("highest forget regurgitation", lambda scores, target, run: _forget(scores, "regurgitation")),
    ("worst retain change", _retain_change),
    ("AUC", lambda scores, target, run: scores["membership"]["auc"]),
    ("strongest AUC", lambda scores, target, run: _strongest(scores, "auc")),
    ("two-sided", lambda scores, target, run: _strongest(scores, "two_sided_auc")),
    ("degenerate", lambda scores, target, run: scores["outputs"]["forget"]["degenerate_text"]),
    ("repetition", lambda scores, target, run: scores["outputs"]["forget"]["repetition"]),
    ("held-out loss, change %", lambda scores, target, run: 100 * (scores["held_nll"] / target["held_nll"] - 1)),
    ("MMLU", _mmlu),
    ("TOFU's model utility", lambda scores, target, run: _benchmark(scores, "model_utility")),
    ("forget quality", lambda scores, target, run: _benchmark(scores, "forget_quality")),
    ("privleak", lambda scores, target, run: _benchmark(scores, "privleak")),
    ("leak@16", lambda scores, target, run: _attacked(scores, "sample", "samples", 16, "leak")),
    ("knowledge, relearned", lambda scores, target, run: _attacked(scores, "relearn", "steps", 5, "knowledge")),
    ("answer NLL", lambda scores, target, run: _attacked(scores, "relearn", "steps", 0, "answer_nll")),
    ("answer NLL, relearned", lambda scores, target, run: _attacked(scores, "relearn", "steps", 5, "answer_nll")),
    ("steps", lambda scores, target, run: run["steps"]),
    ("seconds", lambda scores, target, run: run["wall_seconds"]),
    ("peak GiB", lambda scores, target, run: run["measured_peak"] / 2**30),
]  # fmt: skip
