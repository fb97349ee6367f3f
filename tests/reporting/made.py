"""Generated score and run folders for the report's tests, with complete or minimal scores."""

import json
import random
from pathlib import Path
from typing import Any

from neko_lean.data.examples import TASKS
from neko_lean.jsonio import write_jsonl
from neko_lean.scoring.task import CELLS, KINDS, SPLITS

LEVELS = {"target": 1.0, "calibrated": 0.02, "neko": 0.4}  # the share of the forget set that each model still knows


def around(value: float, width: float = 0.05) -> list[float]:
    return [max(0.0, value - width), min(1.0, value + width)]


def leak_point(samples: int, share: float) -> dict[str, Any]:
    """A point of the sampling attack."""
    cells = {cell: {"value": share, "interval": around(share), "rows": 8} for cell in CELLS if "forget" in cell}
    leaks = {f"{name}leak": share for name in ("", "knowledge_", "regurgitation_")}
    return {"samples": samples, "seed": 0, **leaks, "leak_interval": around(share), "cells": cells}


def attack(area: float) -> dict[str, Any]:
    return {
        "auc": area,
        "auc_interval": around(area, 0.1),
        "two_sided_auc": 0.5,
        "two_sided_auc_interval": around(0.5, 0.1),
        "tpr_members_low": 0.02,
        "tpr_members_high": 0.01,
    }


def full_scores(model: str, left: float, seed: int = 0) -> dict[str, Any]:
    """Scores with every key. `left` is the share of the forget set that the model still knows."""
    rng = random.Random(seed)

    def near(value: float) -> float:
        return min(1.0, max(0.0, value + rng.uniform(-0.04, 0.04)))

    cells = {}
    for cell in CELLS:
        base = left if cell.startswith("forget") else 0.98 - 0.05 * (left > 0.2)
        cells[cell] = near(max(base, 0.25)) if cell.endswith("regurgitation") else near(base)
    area = 0.5 + left / 2
    places = [n / 20 for n in range(21)]
    mmlu = {
        "micro": 0.31,
        "macro": 0.32,
        "shots": 5,
        "questions": 14042,
        "subjects": {
            name: {"accuracy": near(0.3), "questions": 135, "shots": 5} for name in ("anatomy", "world_religions")
        },
        "letters": {"A": 0.4, "B": 0.2, "C": 0.2, "D": 0.2},
        "floors": {"A": 0.2295, "B": 0.2465, "C": 0.2551, "D": 0.2689},
        "award_floor": 0.371,
    }
    leaks = {"contained": left, "alphanumeric": left, "digits": None, "within_ten": near(left + 0.1)}
    known = {"extraction_strength": left, "exact_memorisation": near(left + 0.1), "answer_probability": left}
    known |= {"truth_ratio": None, "answer_rank": 3.0 if left > 0.5 else 812.0}
    wrote = {
        "repetition": 0.05,
        "degenerate_text": 0.0,
        "degenerate_answer": 0.0,
        "entropy": 4.1,
        "rouge_f1": left,
        "length_ratio": 1.02,
    }
    scores = {
        "model": model,
        "rows": {"forget": 36, "retain": 36},
        "dtype": "float32",
        "device": "cpu",
        "max_new_tokens": 256,
        "versions": {"neko-lean": "0.1.0", "torch": "2.13.0"},
        "wall_seconds": 61.0,
        "peak_memory": 2 * 2**30,
        "cells": cells,
        "missing_cells": [],
        "task_aggregate": near(1 - left),
        "membership": {
            **attack(area),
            "score": 1 - 2 * abs(area - 0.5),
            "members": 24,
            "nonmembers": 24,
            "member_loss": 3.1,
            "nonmember_loss": 3.2,
            "perfect_score_mean": 0.866,
            "perfect_score_5th_percentile": 0.674,
            "attacks": {
                place: {name: attack(near(area)) for name in ("loss", "zlib", "min_k", "min_k_plus_plus")}
                for place in ("all", *TASKS)
            },
            "roc": {"fpr": places, "tpr": [x ** (1 / (1 + 6 * left)) for x in places]},
        },
        "mmlu": mmlu,
        "final": 0.7,
        "memorisation": {"forget": known, "retain": {**known, "exact_memorisation": 0.98}},
        "leaks": {"forget": leaks, "retain": {**leaks, "contained": 0.97}},
        "outputs": {"forget": wrote, "retain": wrote},
        "held_nll": 3.3,
        "nonmember_nll": 3.4,
        "broken": False,
        "attacks": {
            "relearn": [
                {
                    "steps": n,
                    "rows": 8,
                    "knowledge": near(left + n / 60),
                    "regurgitation": 0.3,
                    "answer_nll": 4 - n / 10,
                }
                for n in (0, 5, 20)
            ],
            "quantize": [{"bits": n, "knowledge": left, "regurgitation": 0.3} for n in (32, 16, 8, 4)],
            "prefix": [{"tokens": n, "knowledge": near(left + n / 10), "regurgitation": 0.3} for n in (0, 1, 2, 4)],
            "paraphrase": [{"paraphrase": n, "knowledge": left, "regurgitation": 0.3} for n in (0, 1)],
            "sample": [leak_point(n, near(left + n / 40)) for n in (0, 1, 2, 4, 8, 16)],
        },
        "verdict": [f"{model} has {left:.0%} of what it should forget.", "It keeps the rest."],
    }
    scores["intervals"] = {"task_aggregate": around(scores["task_aggregate"])}
    scores["intervals"] |= {f"cells.{cell}": around(value) for cell, value in cells.items()}
    scores["difference"] = None
    if left < 1:
        change = {"difference": left - 1, "interval": [left - 1.1, left - 0.9]}
        scores["difference"] = {"before": "target", **{f"cells.{cell}": change for cell in CELLS if "forget" in cell}}
    return scores


def old_scores(model: str, left: float) -> dict[str, Any]:
    """Scores of an older version, with fewer keys."""
    new = full_scores(model, left)
    kept = ("model", "cells", "missing_cells", "task_aggregate", "rows", "dtype", "device", "max_new_tokens")
    membership = {key: new["membership"][key] for key in ("auc", "score", "members", "nonmembers")}
    return {**{key: new[key] for key in kept}, "membership": membership, "mmlu": None, "final": None}


def make_generations(said: str, rows_each: int = 6) -> list[dict[str, Any]]:
    """`rows_each` rows of each cell, all with the generation `said`."""
    return [
        {
            "split": split,
            "id": f"{split}-{task}-{number}{short}1",
            "task": task,
            "kind": kind,
            "score": 0.25,
            "input": f"Prompt {number} of {task}: who walked into the wood?",
            "output": f"It was Foo{number} of the river, phone 555-01{number:02}.",
            "generation": said,
            "window": said,
            "ended": "eos",
        }
        for split in SPLITS
        for task in TASKS
        for short, kind in KINDS.items()
        for number in range(rows_each)
    ]


def write_scores(folder: Path, scores: dict[str, Any], generations: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    rows = make_generations("It was nobody of the river.") if generations is None else generations
    # JSON can only express a lone surrogate as an escape.
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_run(folder: Path, start: str, recipe: str, steps: int = 60, command: str = "unlearn") -> Path:
    folder.mkdir(parents=True)
    about = {
        "command": command,
        "model": start,
        "recipe": {"name": recipe, "summary": "made up", "lr": 5e-05, "forget_rows": 12, "append_eos": False},
        "seed": 1,
        "steps": steps,
        "weights_of_step": steps,
        "ended": "all steps taken",
        "wall_seconds": 300.0,
        "measured_peak": 2**31,
        "predicted_peak": None,
        "device": "cpu",
        "versions": {"neko-lean": "0.1.0", "torch": "2.13.0"},
    }
    (folder / "run.json").write_text(json.dumps(about))
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "forget_loss": -step / 9, "retain_loss": 0.1 + 0.2 / step, "lr": 1e-4}
        line |= {"seconds": 1.2, "measured_peak": 2**30 + step * 2**22}
        if step % 20 == 0:
            line |= {"eval_forget_exact": 1 / step, "eval_retain_exact": 0.97, "eval_retain_kl": 0.1}
        lines.append(line)
    write_jsonl(folder / "metrics.jsonl", lines)
    return folder


def make_demo(folder: Path) -> Path:
    """Folders as `neko-lean demo` writes them."""
    write_run(folder / "target", "base", "memorize", command="memorize")
    write_scores(folder / "scores-before", full_scores("target", 1.0))
    files = ["data", "target", "scores-before"]
    for seed, recipe in enumerate(("calibrated", "neko"), start=1):
        name = f"unlearned-{recipe}"
        write_run(folder / name, "target", recipe, steps=60 * seed)
        write_scores(folder / f"scores-{recipe}", full_scores(name, LEVELS[recipe], seed))
        files += [f"teacher-{recipe}", name, f"scores-{recipe}"]
    (folder / "demo.json").write_text(json.dumps({"files": {name: str(folder / name) for name in files}}))
    return folder
