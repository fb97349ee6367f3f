"""Run every recipe on the same memorised model, score it, and compare with a model that never saw the forget set.

    .venv/bin/python bench/quality.py LUME [--full] [--half b] [--seeds 1 2 3] [--recipes NAME ...] [--relearn]

LUME is the folder with the dataset's public splits. A small model (the target) learns one half of the validation
split's forget documents and the whole retain set. Another (the gold model) learns only the retain set, from the same
seed in as many steps. Hyperparameters are chosen on one half (--half a --seeds 0) and results reported on the other.

The anchor is text that neither model saw: 60 documents each of Task1 and Task2 from the train split, and for Task3
half of LUME's non-members. The loss attack compares with the other half. The held-out text is 60 other documents per
task of the train split. Models that exist in DIR are not made again. The default set takes about an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_table import table

from neko_lean.data.anchor import read_anchor
from neko_lean.data.batching import pad
from neko_lean.data.examples import TASKS, EncodedExample, Example, read_rows
from neko_lean.data.jsonl_files import read_jsonl
from neko_lean.data.tokenization import encode
from neko_lean.demo.base_model import write_base
from neko_lean.demo.world import anchor_documents, task3_documents
from neko_lean.jsonio import write_jsonl
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.options import OutputOptions, RunOptions, ScoreInputs, ScoreSettings
from neko_lean.outputs import staged_folder
from neko_lean.recipe import load_recipe, needs_alternatives, parse_override, reads_cache, recipe_names, uses_levels
from neko_lean.runs import memorize, unlearn
from neko_lean.scoring.membership import auc, auc_interval, document_losses, two_sided_auc
from neko_lean.scoring.run import score

QUICK = ("gold", "destroyed", "neko", "npo", "calibrated")
MEMORIZE: dict[str, Any] = {
    "retain_rows": 64,
    "batch_tokens": 768,
    "backward": "plain",
    "lr": 1.5e-3,
    "max_steps": 1600,
}
RELEARN_LR = 1e-3  # of the relearning attack; the usual 1e-4 hardly moves a model as small as this
DOCUMENTS = 60  # per task in the held-out text, and in the anchor for Task1 and Task2


def prepare(lume: Path, half: str, root: Path) -> Path:
    """Write the examples and documents of one half to `root`/data, with config and tokenizer of the model."""
    data = root / "data"
    if data.is_dir():
        return data

    # The forget documents of this half, and the retain set.
    all_forget = read_rows(lume, "forget", "validation")
    chosen = set(documents_of_half(all_forget, half))
    forget = [example for example in all_forget if example.document in chosen]
    retain = read_rows(lume, "retain", "validation")

    # Documents that no model sees: for the anchor, the held-out text and the attack.
    unseen = unseen_rows(lume, [*all_forget, *retain])
    first_nonmembers, other_nonmembers = nonmember_halves(lume)
    anchor = [row for row in anchor_documents(unseen["retain"], DOCUMENTS) if row["task"] != "Task3"]
    anchor += [{"document": row["document"], "task": "Task3"} for row in first_nonmembers]

    with staged_folder(data) as stage:
        write_jsonl(stage / "forget.jsonl", map(asdict, forget))
        write_jsonl(stage / "retain.jsonl", map(asdict, retain))
        write_jsonl(stage / "anchor.jsonl", anchor)
        write_jsonl(stage / "held.jsonl", anchor_documents(unseen["forget"], DOCUMENTS))
        (stage / "mia").mkdir()
        write_jsonl(stage / "mia" / "member.jsonl", task3_documents(forget))
        write_jsonl(stage / "mia" / "nonmember.jsonl", other_nonmembers)
        # The tokenizer is trained on seen and unseen text alike; otherwise its merges would reveal the members.
        write_base(stage / "base", [*forget, *retain, *unseen["forget"], *unseen["retain"]])
    return data


def documents_of_half(rows: Sequence[Example], half: str) -> list[str]:
    """The documents of one half of the rows, in a random order that is always the same."""
    names = sorted({row.document for row in rows})
    random.Random("halves").shuffle(names)
    return names[: len(names) // 2] if half == "a" else names[len(names) // 2 :]


def unseen_rows(lume: Path, known: Sequence[Example]) -> dict[str, list[Example]]:
    """The documents of both train splits that are not among the known rows."""
    inputs = {row.input for row in known}
    return {
        name: [row for row in read_rows(lume, name, "train") if row.kind == "completion" and row.input not in inputs]
        for name in ("forget", "retain")
    }


def nonmember_halves(lume: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """LUME's non-members in two random halves that are always the same."""
    nonmembers = [record.values for record in read_jsonl(lume / "mia" / "nonmember.jsonl")]
    random.Random("halves").shuffle(nonmembers)
    middle = len(nonmembers) // 2
    return nonmembers[:middle], nonmembers[middle:]


def make_model(data: Path, out: Path, name: str, seed: int) -> None:
    """Train the target or the gold model, or write random weights."""
    sets = ("retain",) if name == "gold" else ("forget", "retain")
    change = {**MEMORIZE, **({"max_steps": 1, "lr": 1e-12} if name == "destroyed" else {})}
    memorize(data / "base", out, data=data, sets=sets, overrides=change, run=RunOptions(seed=seed, quiet=True))


def unlearn_with(data: Path, target: Path, out: Path, recipe: str, change: dict[str, Any], seed: int) -> None:
    """Cache the teacher with what the recipe needs, and unlearn."""
    settings = load_recipe(recipe, change)
    anchor = data / "anchor.jsonl" if uses_levels(settings) else None
    mass = ["--mass", 1] if needs_alternatives(settings) else []
    cache = target.parent / f"cache-{out.name}"
    # In a separate process, because its memory would otherwise count as the student's.
    command = [sys.executable, "-m", "neko_lean", "cache-teacher", target, data, "--forget", data, "--out", cache]
    command += ["--format", settings.format, "--overwrite", "--quiet", *(["--anchor", anchor] if anchor else []), *mass]
    subprocess.run(list(map(str, command)), check=True)
    unlearn(
        target,
        out,
        forget=data,
        retain=data,
        cache=cache if reads_cache(settings, anchor=anchor is not None) else None,
        anchor=anchor,
        recipe=recipe,
        overrides={"backward": "plain", **change},
        run=RunOptions(seed=seed, quiet=True),
    )


def measure(data: Path, model: Path, target: Path, gold: Path, out: Path, relearn: bool = False) -> dict[str, Any]:
    """Score a model: the task's metrics, membership by task, and the loss on text outside both sets."""
    attacks = ("relearn",) if relearn else ()
    scored = score(
        model,
        out,
        data=data,
        inputs=ScoreInputs(mia=data / "mia"),
        settings=ScoreSettings(batch_size=64, attacks=attacks, relearn_lr=RELEARN_LR if relearn else None),
        run=OutputOptions(quiet=True, overwrite=True),
    )
    lines = [record.values for record in read_jsonl(out / "generations.jsonl")]
    retained = [line for line in lines if line["split"] == "retain"]
    exact = statistics.mean(line["generation"].strip().lower() == line["output"].strip().lower() for line in retained)
    tokenizer = load_tokenizer(target)
    cpu = torch.device("cpu")
    lm, perfect = (load_model(folder, torch.float32, cpu) for folder in (model, gold))
    held = read_anchor(data / "held.jsonl")
    rows = {name: read_rows(data, name) for name in ("forget", "retain")}
    result: dict[str, Any] = {
        "cells": scored["cells"],
        "aggregate": scored["task_aggregate"],
        "auc": scored["membership"]["auc"],
        "membership": scored["membership"]["score"],
        "interval": scored["membership"]["auc_interval"],
        "tell": scored["membership"]["two_sided_auc"],
        "attacks": {name: found["auc"] for name, found in scored["membership"]["attacks"]["all"].items() if found},
        "degenerate": scored["outputs"]["forget"]["degenerate_text"],
        "repetition": scored["outputs"]["forget"]["repetition"],
        "relearn": scored["attacks"]["relearn"] if relearn else [],
        "retain_exact": exact,
    }
    losses = {
        task: document_losses(lm, tokenizer, [row.output for row in held if row.task == task], batch_tokens=8192)
        for task in TASKS
    }
    for task in TASKS:
        texts = [f"{r.input} {r.output}" for r in rows["forget"] if r.kind == "completion" and r.task == task]
        members = document_losses(lm, tokenizer, texts, batch_tokens=8192)
        result[f"auc_{task}"] = auc(members, losses[task])
        result[f"interval_{task}"] = auc_interval(members, losses[task])
        result[f"tell_{task}"] = two_sided_auc(members, losses[task])
        result[f"member_nll_{task}"] = float(members.mean())
        result[f"held_nll_{task}"] = float(losses[task].mean())
    result["held_nll"] = statistics.mean(result[f"held_nll_{task}"] for task in TASKS)

    texts = [f"{r.input} {r.output}" for r in rows["retain"] if r.kind == "completion"]
    result["retain_nll"] = float(document_losses(lm, tokenizer, texts, batch_tokens=8192).mean())
    encoded = encode(rows["forget"], tokenizer, "plain", 512)
    result |= distance(lm, perfect, encoded, int(tokenizer.pad_token_id))
    run = json.loads((model / "run.json").read_text())
    return {**result, "seconds": run["wall_seconds"], "steps": run["steps"], "peak": run["measured_peak"]}


def distance(lm: CausalLM, gold: CausalLM, encoded: Sequence[EncodedExample], pad_id: int) -> dict[str, float]:
    """Distance of a model from the gold model on the answers of the forget set.

    The mean KL(gold to model) per token, and the Kolmogorov-Smirnov test between the examples' answer probabilities,
    exp(mean log-probability). TOFU's forget quality is this test on truth ratios (arXiv 2401.06121).
    """
    divergences: list[float] = []
    probabilities: list[list[float]] = [[], []]
    with torch.no_grad():
        for example in encoded:
            ids, _ = pad([example.input_ids], pad_id, lm.device)
            place = slice(max(1, example.prompt_length) - 1, len(example) - 1)
            target = ids[0, place.start + 1 :]
            p, q = (m.model(input_ids=ids).logits[0, place].log_softmax(1) for m in (gold, lm))
            divergences += (p.exp() * (p - q)).sum(1).tolist()
            for values, logp in zip(probabilities, (p, q), strict=True):
                values.append(logp.gather(1, target[:, None]).mean().exp().item())
    statistic, p_value = kolmogorov_smirnov(*probabilities)
    return {"gold_kl": statistics.mean(divergences), "ks": statistic, "ks_p": p_value}


def kolmogorov_smirnov(left: list[float], right: list[float]) -> tuple[float, float]:
    """The two-sample statistic and its asymptotic p-value."""
    a, b = np.sort(left), np.sort(right)
    values = np.concatenate([a, b])
    gaps = np.searchsorted(a, values, side="right") / len(a) - np.searchsorted(b, values, side="right") / len(b)
    statistic = float(np.abs(gaps).max())
    x = statistic * np.sqrt(len(a) * len(b) / (len(a) + len(b)))
    terms = [(-1) ** (k - 1) * np.exp(-2 * k * k * x * x) for k in range(1, 101)]
    return statistic, float(np.clip(2 * sum(terms), 0, 1)) if x > 0.2 else 1.0


def job(work: tuple[Path, Path, str, str, dict[str, Any], int], relearn: bool) -> str:
    """Make and measure one model for one seed, in a separate process; returns a traceback, or ''."""
    torch.set_num_threads(1)
    root, data, name, recipe, change, seed = work
    folder = root / f"seed-{seed}"
    model, target, gold = folder / name, folder / "target", folder / "gold"
    result = folder / f"{name}.json"
    try:
        if not (model / "run.json").is_file():
            if name in ("target", "gold", "destroyed"):
                make_model(data, model, name, seed)
            else:
                unlearn_with(data, target, model, recipe, change, seed)
        if not result.is_file() and all((m / "run.json").is_file() for m in (model, target, gold)):
            measured = measure(data, model, target, gold, folder / f"{name}-scores", relearn)
            result.write_text(json.dumps({"name": name, "seed": seed, **measured}, indent=1) + "\n")
    except Exception:
        return f"{name}, seed {seed}:\n{traceback.format_exc()}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder with LUME's public splits")
    parser.add_argument(
        "--half",
        choices=("a", "b"),
        default="b",
        help="half of the forget documents: a for choosing hyperparameters, b for reporting",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--full", action="store_true", help="run every shipped recipe")
    parser.add_argument("--recipes", nargs="+", help="run these models instead")
    parser.add_argument(
        "--set",
        dest="change",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="recipe value for all of them; repeatable",
    )
    parser.add_argument("--relearn", action="store_true", help="also try to bring the forget set back by training")
    parser.add_argument("--jobs", type=int, default=2, help="models trained at a time, with one thread each")
    parser.add_argument("--out", type=Path, default=Path("quality-run"))
    options = parser.parse_args()

    objectives = {name: load_recipe(name).forget for name in recipe_names()}
    shipped = [name for name, forget in objectives.items() if name == "idk" or (forget and not forget.base_top_k)]
    names = options.recipes or (["gold", "destroyed", *shipped] if options.full else list(QUICK))
    root = options.out / options.half
    data = prepare(options.lume, options.half, root)
    change = dict(map(parse_override, options.change))

    # Target and gold first, because the models of the recipes need them.
    first = [(root, data, name, name, change, seed) for seed in options.seeds for name in ("target", "gold")]
    rest = [(root, data, name, name, change, seed) for name in names for seed in options.seeds]
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for work in (first, [*first, *rest]):
            results = pool.imap(partial(job, relearn=options.relearn), work, chunksize=1)
            for number, error in enumerate(results, start=1):
                print(
                    f"{number}/{len(work)} {work[number - 1][2]} seed {work[number - 1][5]}",
                    file=sys.stderr,
                    flush=True,
                )
                if error:
                    print(error, file=sys.stderr, flush=True)
    lines = table(root, names, options.seeds)
    (root / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
