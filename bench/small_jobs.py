"""Every command that writes, on a model so small that a run takes a fraction of a second, and what it must write.

For kill.py and two_processes.py: a job is a command with one of several sets of options. `fingerprint` covers what two
outputs of the same job have in common byte for byte, which is everything except times.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

# Imported here because loading a model would otherwise import them in every child.
from transformers import AutoTokenizer, OlmoForCausalLM  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils.logging import disable_progress_bar

import neko_lean.demo.run as demo_module
from neko_lean.cache import CacheOptions, cache_teacher, planning
from neko_lean.data.examples import Example, read_rows
from neko_lean.demo import world as demo_world
from neko_lean.demo.base_model import write_base
from neko_lean.demo.run import demo
from neko_lean.demo.world import World, build_world, write_world
from neko_lean.jsonio import write_jsonl
from neko_lean.models.loading import load_tokenizer, new_model
from neko_lean.options import DemoOptions, OutputOptions, RunOptions, ScoreInputs, ScoreSettings
from neko_lean.recipe import load_recipe, reads_cache
from neko_lean.reporting.page import report
from neko_lean.runs import memorize, training_run, unlearn
from neko_lean.scoring.run import score

# Keys whose values differ between runs that computed the same.
TIMES = {"wait_seconds", "seconds", "wall_seconds", "peak_memory", "measured_peak", "measured_peaks"}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "attention_dropout": 0.1,
}
SHORT = {"forget_rows": 4, "retain_rows": 4, "max_length": 64, "eval_rows": 4, "lr": 1e-3, "max_steps": 6}
QUIET = OutputOptions(quiet=True)
ROWS = {"forget": 6, "retain": 10}
COMMANDS = ("cache-teacher", "unlearn", "memorize", "score", "report", "demo")


@dataclass(frozen=True)
class Job:
    """A command with options. Two jobs with the same name write the same bytes."""

    command: str
    number: int  # which set of options
    call: Callable[..., Any] = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.command} {self.number}"

    def __call__(self, out: Path, **flags: bool) -> Any:
        """Run the command and return its result without times."""
        if self.command in ("report", "demo"):
            flags.pop("resume", None)
        return without_times(self.call(out, **flags), out)


def make_world(root: Path) -> None:
    """Write data, a model with random weights, teacher caches of it, and scores for reports."""
    world = build_world(0)
    write_world(world, root / "data")
    for name, count in ROWS.items():
        rows: list[Example] = sorted(read_rows(root / "data", name), key=lambda row: len(row.input + row.output))
        write_jsonl(
            root / "data" / f"{name}.jsonl", map(asdict, rows[: len(rows) // 2 : len(rows) // 2 // count][:count])
        )
    for name, count in (("anchor", 12), ("mia/member", 3), ("mia/nonmember", 3)):
        file = root / "data" / f"{name}.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:: len(lines) // count][:count]))
    rows = [row for name in ROWS for row in read_rows(root / "data", name)]
    write_base(root / "model", rows, vocabulary=300)
    shape(root / "model")
    tokenizer = load_tokenizer(root / "model")
    new_model(root / "model", torch.bfloat16, torch.device("cpu"), 0).model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    quiet = OutputOptions(quiet=True)
    cache_teacher(
        root / "model",
        root / "cache",
        retain=root / "data",
        cache=CacheOptions(max_length=64, format="neko"),
        run=quiet,
    )
    anchor = root / "data" / "anchor.jsonl"
    cache_teacher(
        root / "model",
        root / "anchored",
        retain=root / "data",
        anchor=anchor,
        cache=CacheOptions(max_length=64),
        run=quiet,
    )
    score(
        root / "model",
        root / "scores",
        data=root / "data",
        settings=ScoreSettings(max_new_tokens=3),
        run=OutputOptions(quiet=True),
    )


def shape(folder: Path, **change: Any) -> None:
    """Shrink the config of a model without weights to SHAPE."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **SHAPE, **change}))


def make_small() -> None:
    """Shrink shards and the demo so that a short run has several of everything."""
    disable_progress_bar()
    get_checkpoint_conversion_mapping("olmo")  # built once for all children
    gc.freeze()  # otherwise every run would traverse all imported objects
    training_run.predicted_peak = lambda *_: None  # a prediction takes twice as long as such a run
    planning.SHARD_POSITIONS = 100
    demo_module.MEMORIZE = {"retain_rows": 4, "max_steps": 2, "backward": "plain", "max_length": 64}
    demo_module.ScoreSettings = partial(ScoreSettings, max_new_tokens=2)
    base = demo_module.write_base

    def small_world(seed: int) -> World:
        demo_world.STORIES = demo_world.PEOPLE = demo_world.ENTRIES = 1
        return build_world(seed)

    def small_base(folder: Path, rows: list[Example]) -> None:
        base(folder, rows)
        shape(folder)

    demo_module.write_base, demo_module.build_world = small_base, small_world


def jobs(root: Path) -> dict[str, list[Job]]:
    """Every command with its sets of options, on the data in `root`."""
    model, data, cache = root / "model", root / "data", root / "cache"

    def caching(out: Path, *, change: dict[str, Any], **flags: bool) -> dict[str, Any]:
        options = CacheOptions(**{"top_k": 8, "max_length": 64, "batch_tokens": 128, **change})
        return asdict(
            cache_teacher(model, out, retain=data, forget=data, cache=options, run=OutputOptions(quiet=True, **flags))
        )

    def unlearning(out: Path, *, change: dict[str, Any], seed: int = 3, own_cache: bool = False, **flags: bool) -> Any:
        recipe: dict[str, Any] = {"recipe": "neko", "overrides": {**SHORT, **change}}
        run = RunOptions(seed=seed, save_every=2, quiet=True, **flags)
        return unlearn(model, out, forget=data, retain=data, cache=None if own_cache else cache, **recipe, run=run)

    def memorizing(out: Path, *, change: dict[str, Any], seed: int = 3, **flags: bool) -> Any:
        run = RunOptions(seed=seed, save_every=2, quiet=True, **flags)
        return memorize(model, out, data=data, overrides={**SHORT, **change}, run=run)

    def scoring_(out: Path, *, max_new_tokens: int, inputs: ScoreInputs = ScoreInputs(), **flags: bool) -> Any:
        settings = ScoreSettings(batch_size=4, max_new_tokens=max_new_tokens)
        return score(model, out, data=data, inputs=inputs, settings=settings, run=replace(QUIET, **flags))

    def reporting(out: Path, **kwargs: Any) -> Any:
        return report([root / "scores"], out, **kwargs)

    def demoing(out: Path, *, seed: int, **flags: bool) -> Any:
        result = demo(out, max_steps=2, run=DemoOptions(seed=seed, quiet=True, **flags))
        return {key: result[key] for key in ("verdict", "files")}

    calls: dict[str, list[Callable[..., Any]]] = {
        "cache-teacher": [partial(caching, change=change) for change in ({}, {"top_k": 4}, {"max_length": 32})],
        "unlearn": [
            partial(unlearning, change={}),
            partial(unlearning, change={}, seed=4),
            partial(unlearning, change={"lr": 2e-3}),
            partial(unlearning, change={"max_steps": 4}, own_cache=True),
        ],
        "memorize": [
            partial(memorizing, change={}),
            partial(memorizing, change={}, seed=4),
            partial(memorizing, change={"eval_every": 2, "choose": "quality"}),
        ],
        "score": [
            partial(scoring_, max_new_tokens=3),
            partial(scoring_, max_new_tokens=2),
            partial(scoring_, max_new_tokens=3, inputs=ScoreInputs(mia=data / "mia")),
        ],
        "report": [partial(reporting, title="One"), partial(reporting, title="Two"), partial(reporting, texts=False)],
        "demo": [partial(demoing, seed=seed) for seed in (0, 1)],
    }
    return {name: [Job(name, number, call) for number, call in enumerate(variants)] for name, variants in calls.items()}


def training_jobs(root: Path) -> dict[str, Job]:
    """Runs of `unlearn` that together cover everything that the next step can depend on, by name."""
    model, data = root / "model", root / "data"
    evaluated = {"max_steps": 12, "eval_every": 2, "lr": 5e-3}
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "calibrated, layerwise, chosen by quality": (
            "calibrated",
            {**evaluated, "choose": "quality", "stop": "steps", "patience": 3},
        ),
        "sequential, plain, dropout, a phase a chunk": (
            "sequential",
            {"max_steps": 12, "chunk_rows": 3, "epochs": 2.0, "backward": "plain", "dropout": True},
        ),
        "alternating, checkpointed, early stopping": (
            "alternating",
            {**evaluated, "patience": 2, "backward": "checkpointed"},
        ),
    }

    def unlearning(out: Path, *, recipe: str, change: dict[str, Any], **flags: bool) -> Any:
        overrides = {**SHORT, **change}
        cache = root / "anchored" if reads_cache(load_recipe(recipe, overrides), anchor=True) else None
        inputs: dict[str, Any] = {"cache": cache, "anchor": data / "anchor.jsonl"}
        run = RunOptions(seed=3, save_every=3, quiet=True, **flags)
        return unlearn(model, out, forget=data, retain=data, **inputs, recipe=recipe, overrides=overrides, run=run)

    return {
        name: Job("unlearn", 100 + number, partial(unlearning, recipe=recipe, change=change))
        for number, (name, (recipe, change)) in enumerate(runs.items())
    }


def fingerprint(out: Path) -> str | None:
    """SHA-256 over the names and bytes of an output, without times; None if there is no output."""
    if not out.exists():
        return None
    digest = hashlib.sha256()
    paths = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    for path in paths:
        digest.update(f"{path.relative_to(out)}\0".encode())
        digest.update(_content(path, out))
    return digest.hexdigest()


def _content(path: Path, out: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "report.html" and path != out:
        return b""  # the report of a demo contains times
    if path.name in ("run.json", "scores.json", "demo.json"):
        if (out / "demo.json").exists():  # its digest covers earlier scores, including their times
            data = re.sub(rb'"made_from": "[0-9a-f]+"', b'"made_from": ""', data)
        return json.dumps(without_times(json.loads(data), out)).encode()
    if path.name == "metrics.jsonl":
        return json.dumps([without_times(json.loads(line), out) for line in data.splitlines()]).encode()
    return data


def without_times(value: Any, out: Path) -> Any:
    """A command's result without times and without the path of its output."""
    if isinstance(value, dict):
        return {key: without_times(item, out) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [without_times(item, out) for item in value]
    if isinstance(value, str):
        text = value.replace(str(out), "OUT").replace(str(out.with_name(f".{out.name}.demo")), "OUT")
        return re.sub(r"\d+ s\b", "s", text)
    return value
