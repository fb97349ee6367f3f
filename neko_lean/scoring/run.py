"""Score one checkpoint: generate, count, ask whether members stand out, and write what was found."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from neko_lean.data import TASKS, read_rows
from neko_lean.documents import read_documents
from neko_lean.errors import NekoLeanError, staged_folder
from neko_lean.memory import peak_memory
from neko_lean.modeling import load_model, load_tokenizer, model_folder, model_name, pick_device, pick_dtype
from neko_lean.progress import bar
from neko_lean.scoring import membership
from neko_lean.scoring.generation import generate
from neko_lean.scoring.task import CELLS, KINDS, SPLITS, cell_means, missing_cells, row_score, task_aggregate

NOT_MEASURED = "not measured"
MIA = "--mia wants a folder with member.jsonl and nonmember.jsonl"
BATCH_TOKENS = 8192


def score(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    mia: str | Path | None = None,
    split: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a checkpoint on forget and retain rows as the shared task does; write generations.jsonl and scores.json.

    Args:
        model: checkpoint folder or hub name.
        data: folder holding `forget.*` and `retain.*` (with `split`: `forget_<split>.*`, ...).
        out: folder to write; appears only when it is complete.
        mia: folder holding member.jsonl and nonmember.jsonl; without it membership is not measured.
        batch_size: prompts generated together.
        max_new_tokens: most tokens of a generation; the task's own limit is 256.
        dtype: 'float32' or 'bfloat16'; by default float32 on a CPU and bfloat16 on a GPU.

    Returns what scores.json holds: `cells` (twelve means, 0 to 1, None where no row was), `task_aggregate` (None when
    a cell is missing), `membership` (None, or auc, its 95 % auc_interval, two_sided_auc and score, 0 to 1), `mmlu` and
    `final` (None: not measured).
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise NekoLeanError("batch-size and max-new-tokens must be at least 1.")
    rows = {name: read_rows(data, name, split) for name in SPLITS}
    documents = None
    if mia is not None:
        documents = [read_documents(Path(mia) / f"{name}.jsonl", MIA) for name in ("member", "nonmember")]
    place, folder = pick_device(device), model_folder(model)
    precision = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    start = time.monotonic()
    with staged_folder(Path(out), overwrite) as stage:
        tokenizer = load_tokenizer(folder)
        lm = load_model(folder, pick_dtype(precision), place)
        everything = [(name, row) for name in SPLITS for row in rows[name]]
        with bar("score", len(everything), "rows", quiet) as progress:
            texts = generate(
                lm,
                tokenizer,
                [row.input for _, row in everything],
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
        scored: dict[str, list[Any]] = {name: [] for name in SPLITS}
        with (stage / "generations.jsonl").open("w", encoding="utf-8") as file:
            for (name, row), text in zip(everything, texts, strict=True):
                value = row_score(row, text)
                scored[name].append((row, value))
                line = {"split": name, "id": row.id, "task": row.task, "kind": KINDS[row.kind], "score": value}
                line |= {"input": row.input, "output": row.output, "generation": text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        cells = cell_means(scored)
        found = None
        if documents is not None:
            with bar("membership", sum(map(len, documents)), "documents", quiet) as progress:
                member, other = (
                    membership.document_losses(lm, tokenizer, part, batch_tokens=BATCH_TOKENS, progress=progress)
                    for part in documents
                )
            area = membership.auc(member, other)
            mean, low = membership.perfect_range(len(member), len(other))
            found = {
                "auc": area,
                "score": membership.membership_score(area),
                "auc_interval": list(membership.auc_interval(member, other)),
                "two_sided_auc": membership.two_sided_auc(member, other),
                "members": len(member),
                "nonmembers": len(other),
                "member_loss": float(member.mean()),
                "nonmember_loss": float(other.mean()),
                "perfect_score_mean": mean,
                "perfect_score_5th_percentile": low,
            }
        scores = {
            "model": model_name(model),
            "cells": cells,
            "missing_cells": missing_cells(cells),
            "task_aggregate": task_aggregate(cells),
            "membership": found,
            "mmlu": None,
            # The official final is the mean of three; with one of them unknown there is none.
            "final": None,
            "rows": {name: len(rows[name]) for name in SPLITS},
            "dtype": precision,
            "device": str(place),
            "max_new_tokens": max_new_tokens,
            "wall_seconds": time.monotonic() - start,
            "peak_memory": peak_memory(place),
        }
        (stage / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return scores


def _shown(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3f}"


def score_table(named: dict[str, dict[str, Any]]) -> Group:
    """A table of one or more scores side by side, with notes below; keys are the columns' headings."""
    table = Table()
    table.add_column("")
    for name in named:
        table.add_column(name, justify="right")
    for split in SPLITS:
        for task in TASKS:
            for kind in KINDS.values():
                cell = f"{split}.{task}.{kind}"
                table.add_row(f"{split} {task} {kind}", *(_shown(s["cells"][cell]) for s in named.values()))
        table.add_section()
    table.add_row("task aggregate", *(_shown(s["task_aggregate"]) for s in named.values()))
    found = [s["membership"] for s in named.values()]
    table.add_row("membership AUC", *(_shown(one and one["auc"]) for one in found))
    intervals = [one and " to ".join(f"{end:.2f}" for end in one["auc_interval"]) for one in found]
    table.add_row("  95 % interval", *(one or NOT_MEASURED for one in intervals))
    table.add_row("membership AUC, two-sided", *(_shown(one and one["two_sided_auc"]) for one in found))
    table.add_row("membership score", *(_shown(one and one["score"]) for one in found))
    table.add_row("MMLU", *(_shown(s["mmlu"]) for s in named.values()))
    table.add_row("final", *(_shown(s["final"]) for s in named.values()))
    notes = ["All numbers are 0 to 1. Forget rows: lower is forgotten. Retain rows: higher is kept."]
    missing = [cell for cell in CELLS if any(cell in s["missing_cells"] for s in named.values())]
    if missing:
        notes.append(f"No aggregate: no rows for {', '.join(missing)}.")
    measured = next((s["membership"] for s in named.values() if s["membership"]), None)
    if measured:
        notes.append(
            f"A perfect model's membership score averages {measured['perfect_score_mean']:.3f} with "
            f"{measured['members']} + {measured['nonmembers']} documents "
            f"(5th percentile {measured['perfect_score_5th_percentile']:.3f})."
        )
    return Group(table, *notes)
