"""Every command that writes, on a model so small that a run takes a fraction of a second, and what it has to write.

For kill.py and two_processes.py: a job is a command with one of several sets of options, and `fingerprint` is what two
outputs of the same job have in common byte for byte, which is all but times.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

# Loading would import these in every child again.
from transformers import AutoTokenizer, OlmoForCausalLM  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils.logging import disable_progress_bar

import neko_lean.demo.run as demo_module
from neko_lean import scoring
from neko_lean.cache import CacheOptions, cache_teacher, planning
from neko_lean.data.examples import Example, read_rows
from neko_lean.demo import world as demo_world
from neko_lean.demo.run import demo, write_base
from neko_lean.demo.world import World, build_world, write_world
from neko_lean.jsonio import write_jsonl
from neko_lean.models.loading import load_tokenizer, new_model
from neko_lean.options import OutputOptions
from neko_lean.recipes import load_recipe, reads_cache
from neko_lean.report.page import report
from neko_lean.runs.unlearn import memorize, unlearn
from neko_lean.scoring.run import score
from neko_lean.training import loop

# What differs from run to run without a difference in what was computed.
TIMES = {"wait_seconds", "seconds", "wall_seconds", "peak_memory", "measured_peak", "measured_peaks"}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "attention_dropout": 0.1,
}
SHORT = {"forget_rows": 4, "retain_rows": 4, "max_length": 64, "eval_rows": 4, "lr": 1e-3, "max_steps": 6}
ROWS = {"forget": 6, "retain": 10}
COMMANDS = ("cache-teacher", "unlearn", "memorize", "score", "report", "demo")


@dataclass(frozen=True)
class Job:
    """A command with options; two jobs of one name write the same bytes."""

    command: str
    number: int  # of its options
    call: Callable[..., Any] = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.command} {self.number}"

    def __call__(self, out: Path, **flags: bool) -> Any:
        """Run it; returns what it tells its caller, without times."""
        if self.command in ("report", "demo"):
            flags.pop("resume", None)
        return without_times(self.call(out, **flags), out)


def make_world(root: Path) -> None:
    """Data, a model with random weights, a teacher's cache of it, and scores for reports."""
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
        root / "model", root / "data", root / "cache", cache=CacheOptions(max_length=64, format="neko"), run=quiet
    )
    anchor = root / "data" / "anchor.jsonl"
    cache_teacher(
        root / "model", root / "data", root / "anchored", anchor=anchor, cache=CacheOptions(max_length=64), run=quiet
    )
    score(root / "model", root / "data", root / "scores", max_new_tokens=3, quiet=True)


def shape(folder: Path, **change: Any) -> None:
    """Shrink a model without weights to SHAPE."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **SHAPE, **change}))


def make_small() -> None:
    """Pieces and demo so small that a short run has several of everything."""
    disable_progress_bar()
    get_checkpoint_conversion_mapping("olmo")  # built once, here, for all children
    gc.freeze()  # or every run would look through all that was imported
    loop.predicted_peak = lambda *_: None  # which takes twice as long as such a run
    planning.SHARD_POSITIONS = 100
    demo_module.MEMORIZE = {"retain_rows": 4, "max_steps": 2, "backward": "plain", "max_length": 64}
    demo_module.VOCABULARY = 300
    demo_module.score = partial(scoring.score, max_new_tokens=2)
    base = demo_module.write_base

    def small_world(seed: int) -> World:
        demo_world.STORIES = demo_world.PEOPLE = demo_world.ENTRIES = 1
        return build_world(seed)

    def small_base(folder: Path, rows: list[Example]) -> None:
        base(folder, rows)
        shape(folder)

    demo_module.write_base, demo_module.build_world = small_base, small_world


def jobs(root: Path) -> dict[str, list[Job]]:
    """Each command with its sets of options, on the world in `root`."""
    model, data, cache = root / "model", root / "data", root / "cache"

    def caching(out: Path, *, change: dict[str, Any], **flags: bool) -> dict[str, Any]:
        options = CacheOptions(**{"top_k": 8, "max_length": 64, "batch_tokens": 128, **change})
        return asdict(
            cache_teacher(model, data, out, forget=data, cache=options, run=OutputOptions(quiet=True, **flags))
        )

    def unlearning(out: Path, *, change: dict[str, Any], seed: int = 3, own_cache: bool = False, **flags: bool) -> Any:
        given = {"recipe": "neko", "overrides": {**SHORT, **change}, "save_every": 2, "quiet": True}
        return unlearn(model, out, data, data, cache=None if own_cache else cache, seed=seed, **given, **flags)

    def memorizing(out: Path, *, change: dict[str, Any], seed: int = 3, **flags: bool) -> Any:
        given = {"overrides": {**SHORT, **change}, "save_every": 2, "quiet": True}
        return memorize(model, data, out, seed=seed, **given, **flags)

    def scoring_(out: Path, **given: Any) -> Any:
        return score(model, data, out, batch_size=4, quiet=True, **given)

    def reporting(out: Path, **given: Any) -> Any:
        return report([root / "scores"], out, **given)

    def demoing(out: Path, *, seed: int, **flags: bool) -> Any:
        told = demo(out, seed=seed, max_steps=2, quiet=True, **flags)
        return {key: told[key] for key in ("verdict", "files")}

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
            partial(scoring_, max_new_tokens=3, mia=data / "mia"),
        ],
        "report": [partial(reporting, title="One"), partial(reporting, title="Two"), partial(reporting, texts=False)],
        "demo": [partial(demoing, seed=seed) for seed in (0, 1)],
    }
    return {name: [Job(name, number, call) for number, call in enumerate(some)] for name, some in calls.items()}


def training_jobs(root: Path) -> dict[str, Job]:
    """Runs of `unlearn` that differ in all that the next step depends on, by what they have."""
    model, data = root / "model", root / "data"
    looks = {"max_steps": 12, "eval_every": 2, "lr": 5e-3}
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "calibrated, layerwise, chosen by quality": ("calibrated", {**looks, "choose": "quality", "patience": 3}),
        "sequential, plain, dropout, a phase a chunk": (
            "sequential",
            {"max_steps": 12, "chunk_rows": 3, "epochs": 2.0, "backward": "plain", "dropout": True},
        ),
        "alternating, checkpointed, early stopping": (
            "alternating",
            {**looks, "patience": 2, "backward": "checkpointed"},
        ),
    }

    def unlearning(out: Path, *, recipe: str, change: dict[str, Any], **flags: bool) -> Any:
        overrides = {**SHORT, **change}
        cache = root / "anchored" if reads_cache(load_recipe(recipe, overrides), anchor=True) else None
        given: dict[str, Any] = {"recipe": recipe, "overrides": overrides, "seed": 3, "save_every": 3, "quiet": True}
        return unlearn(model, out, data, data, cache=cache, anchor=data / "anchor.jsonl", **given, **flags)

    return {
        name: Job("unlearn", 100 + number, partial(unlearning, recipe=recipe, change=change))
        for number, (name, (recipe, change)) in enumerate(runs.items())
    }


def fingerprint(out: Path) -> str | None:
    """SHA-256 over an output's names and bytes, without times; None where nothing is there."""
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
        return b""  # of a demo: it tells how long everything took
    if path.name in ("run.json", "scores.json", "demo.json"):
        if (out / "demo.json").exists():  # its scores are made from an earlier one, times and all
            data = re.sub(rb'"made_from": "[0-9a-f]+"', b'"made_from": ""', data)
        return json.dumps(without_times(json.loads(data), out)).encode()
    if path.name == "metrics.jsonl":
        return json.dumps([without_times(json.loads(line), out) for line in data.splitlines()]).encode()
    return data


def without_times(value: Any, out: Path) -> Any:
    """What a command tells or writes, except times and where it wrote it."""
    if isinstance(value, dict):
        return {key: without_times(one, out) for key, one in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [without_times(one, out) for one in value]
    if isinstance(value, str):
        text = value.replace(str(out), "OUT").replace(str(out.with_name(f".{out.name}.demo")), "OUT")
        return re.sub(r"\d+ s\b", "s", text)
    return value
