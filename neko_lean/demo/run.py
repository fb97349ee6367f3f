"""The demo: make data and model, memorize; then with each recipe cache the teacher, unlearn and score."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from neko_lean.cache import CacheOptions, cache_teacher
from neko_lean.data import read_anchor, read_rows, require_folder
from neko_lean.demo.base_model import write_base
from neko_lean.demo.real_data import copy_rows
from neko_lean.demo.world import build_world, write_world
from neko_lean.errors import NekoLeanError
from neko_lean.models import check_seed, has_bfloat16, pick_device
from neko_lean.options import DemoOptions, OutputOptions, RunOptions
from neko_lean.outputs import staged_folder, write_atomically
from neko_lean.recipe import (
    DEFAULT,
    Recipe,
    forgets,
    load_recipe,
    reads_cache,
    reads_forget_losses,
    uses_anchor,
)
from neko_lean.reporting import report
from neko_lean.runs import memorize, unlearn
from neko_lean.scoring import ScoreInputs, ScoreSettings, score
from neko_lean.terminal import log_line

# Batches are limited by tokens rather than rows: otherwise most steps would train on the short qa examples.
MEMORIZE: dict[str, Any] = {"retain_rows": 64, "batch_tokens": 768, "epochs": 35.0, "backward": "plain"}
COMPARED = "neko"  # the paper's recipe, which every demo runs for comparison
COMPARED_STEPS = 250  # half of its own, so that the demo stays short
REPORT = "report.html"


@dataclass
class _Demo:
    """The demo's folder while it is written, and what has been done in it."""

    stage: Path
    options: DemoOptions
    dtype: dict[str, Any]  # as overrides; float32 where bfloat16 would be emulated
    scores: dict[str, Any] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.stage / "data"

    @property
    def output(self) -> OutputOptions:
        return OutputOptions(device=self.options.device, quiet=self.options.quiet)

    @property
    def run(self) -> RunOptions:
        return RunOptions(seed=self.options.seed, device=self.options.device, quiet=self.options.quiet)


def demo(
    out: str | Path,
    *,
    data: str | Path | None = None,
    split: str | None = None,
    recipe: str | Path = DEFAULT,
    max_steps: int | None = None,
    run: DemoOptions = DemoOptions(),
) -> dict[str, Any]:
    """Run all commands at small scale and write everything to the folder `out`.

    Args:
        out: folder to write.
        data: folder of real data instead of the made-up world (see neko_lean.demo.world): `forget.*` and `retain.*`, or
            with `split` `forget_<split>.*`. Its `mia/nonmember.jsonl`, if there is one, holds documents that the model
            never saw. Its `anchor.jsonl` is the anchor; without one, other documents of `retain_train` are.
        split: part of the files' names, as LUME has them.
        recipe: name of a shipped recipe, or path of a .toml file. The paper's runs as well, for comparison.
        max_steps: number of steps for both recipes.
        run: device, seed, and how to treat an existing output.

    Returns:
        `scores` (of the model before, and after each recipe), `verdict` in words, and the paths of the `files`.
    """
    check_seed(run.seed)
    device = pick_device(run.device)
    recipes = _recipes(str(recipe), max_steps)
    if split is not None and data is None:
        raise NekoLeanError(
            "--split has no effect without --data, because the made-up world has no splits; leave it out."
        )
    if data is not None:
        require_folder(data, "--data", ("forget", "retain"), split)

    start = time.monotonic()
    inputs = [data, recipe if str(recipe).endswith(".toml") else None]
    with staged_folder(out, "demo", inputs, overwrite=run.overwrite) as stage:
        # Emulated bfloat16 would turn minutes into an hour.
        work = _Demo(stage, run, {} if has_bfloat16(device) else {"dtype": "float32"})
        _write_data(work, data, split)
        _memorize(work)
        for path, overrides, chosen in recipes:
            _forget(work, path, overrides, chosen)
        report([stage], stage / REPORT)
        work.sentences.append(f"Whole demo: {time.monotonic() - start:.0f} s.")

        result = {
            "scores": work.scores,
            "verdict": "\n".join(work.sentences),
            "files": {name: str(Path(out) / name) for name in [*work.files, REPORT]},
        }
        write_atomically(stage / "demo.json", json.dumps(result, indent=1) + "\n")
    return result


def _recipes(recipe: str, max_steps: int | None) -> list[tuple[str, dict[str, Any], Recipe]]:
    """The recipe and the one that it is compared with: name or path, overrides, and the recipe itself."""
    recipes = []
    for name in dict.fromkeys([recipe, COMPARED]):
        overrides: dict[str, Any] = {"backward": "plain"}
        if name == COMPARED:
            overrides["max_steps"] = COMPARED_STEPS
        if max_steps is not None:
            overrides["max_steps"] = max_steps
        chosen = load_recipe(name, overrides)
        if not forgets(chosen):
            raise NekoLeanError(f"recipe {chosen.name} forgets nothing; choose a recipe for unlearn.")
        recipes.append((name, overrides, chosen))
    return recipes


def _write_data(work: _Demo, data: str | Path | None, split: str | None) -> None:
    if data is None:
        write_world(build_world(work.options.seed), work.data)
    else:
        copy_rows(Path(data), split, work.data)
    work.files.append("data")


def _memorize(work: _Demo) -> None:
    """Train the target model, which knows both sets, and score it."""
    forget, retain = read_rows(work.data, "forget"), read_rows(work.data, "retain")
    log_line(f"world: {len(forget)} forget rows, {len(retain)} retain rows", work.options.quiet)
    base, target = work.stage / "base", work.stage / "target"
    # A tokenizer that has only seen the members' texts would need fewer tokens for them, and so tell them apart.
    unseen = [work.data / name for name in ("anchor.jsonl", "mia/nonmember.jsonl")]
    write_base(base, [*forget, *retain, *chain.from_iterable(read_anchor(file) for file in unseen if file.is_file())])
    memorize(base, target, data=work.data, overrides={**MEMORIZE, **work.dtype}, run=work.run)
    work.scores["before"] = _score(work, target, "scores-before", None)
    work.files += ["target", "scores-before"]


def _forget(work: _Demo, path: str, overrides: dict[str, Any], recipe: Recipe) -> None:
    """Unlearn with one recipe and score the result."""
    # The paper's recipe preserves the retain set alone.
    anchor = work.data / "anchor.jsonl"
    has_anchor = anchor.is_file() and recipe.name != COMPARED and uses_anchor(recipe)
    target, teacher = work.stage / "target", f"teacher-{recipe.name}"
    unlearned, scores = f"unlearned-{recipe.name}", f"scores-{recipe.name}"

    has_cache = reads_cache(recipe, anchor=has_anchor)
    if has_cache:
        cache_teacher(
            target,
            work.stage / teacher,
            retain=work.data,
            anchor=anchor if has_anchor else None,
            forget=work.data if reads_forget_losses(recipe, anchor=has_anchor) else None,
            cache=CacheOptions(format=recipe.format, system=recipe.system, max_length=recipe.max_length, **work.dtype),
            run=work.output,
        )
        work.files.append(teacher)
    result = unlearn(
        target,
        work.stage / unlearned,
        forget=work.data,
        retain=work.data,
        cache=work.stage / teacher if has_cache else None,
        anchor=anchor if has_anchor else None,
        recipe=path,
        overrides={**work.dtype, **overrides},
        run=work.run,
    )
    after = _score(work, work.stage / unlearned, scores, work.stage / "scores-before")
    work.scores[recipe.name] = after
    work.sentences.append(summary_sentence(recipe.name, result, work.scores["before"], after))
    work.files += [unlearned, scores]


def _score(work: _Demo, model: Path, out: str, before: Path | None) -> dict[str, Any]:
    mia = work.data / "mia"
    return score(
        model,
        work.stage / out,
        data=work.data,
        inputs=ScoreInputs(mia=mia if mia.is_dir() else None, before=before),
        settings=ScoreSettings(batch_size=64),
        run=work.output,
    )


def summary_sentence(recipe: str, run: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> str:
    """How the means of the forget and the retain cells changed."""

    def mean(scores: dict[str, Any], split: str) -> float:
        values = [v for cell, v in scores["cells"].items() if cell.startswith(split) and v is not None]
        return float(sum(values) / len(values))

    forget, retain = ([mean(scores, split) for scores in (before, after)] for split in ("forget", "retain"))
    return (
        f"Recipe {recipe}, {run['steps']} steps in {run['wall_seconds']:.0f} s: the mean of the forget cells went from "
        f"{forget[0]:.3f} to {forget[1]:.3f}, of the retain cells from {retain[0]:.3f} to {retain[1]:.3f}."
    )
