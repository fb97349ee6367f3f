"""What all commands share: aliases of recipe keys, messages, and checks before any work."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import neko_lean.cache.writer
import neko_lean.data.hub
import neko_lean.runs.memorizing
import neko_lean.runs.unlearning
import neko_lean.scoring.inputs
import neko_lean.scoring.job
from neko_lean.cli import app
from neko_lean.cli.memorize import MemorizeFlags
from neko_lean.cli.plan import PlanFlags
from neko_lean.cli.unlearn import UnlearnFlags
from neko_lean.errors import NekoLeanError
from neko_lean.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


# Aliases of recipe keys


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        (UnlearnFlags(learning_rate=1e-5), {"lr": 1e-5}),
        (UnlearnFlags(batch_size=4), {"forget_rows": 4}),
        (MemorizeFlags(batch_size=4), {"retain_rows": 4}),
        (UnlearnFlags(epochs=3.0), {"epochs": 3.0, "max_steps": 0}),
        (UnlearnFlags(epochs=3.0, max_steps=7), {"epochs": 3.0, "max_steps": 7}),
        (UnlearnFlags(epochs=3.0, set=("max_steps=7",)), {"epochs": 3.0, "max_steps": 7}),
        (UnlearnFlags(learning_rate=0.0, offload_state=True), {"lr": 0.0, "offload_state": True}),
        (UnlearnFlags(learning_rate=1e-5, set=("lr=0.00001",)), {"lr": 1e-5}),
        (UnlearnFlags(), {}),
    ],
)
def test_an_option_is_an_alias_of_one_recipe_key(flags, same):
    assert flags.overrides() == same


def test_the_options_reach_the_recipe(world, model, tmp_path):
    words = ("unlearn", model, "--forget", world, "--retain", world, "--out", tmp_path / "o", "--dry-run", "--json")
    plan = json.loads(call(*words, "--lr", 1e-5, "--epochs", 2, "--batch-size", 6).stdout)
    assert (
        plan["recipe"]
        == load_recipe("calibrated", {"lr": 1e-5, "epochs": 2, "max_steps": 0, "forget_rows": 6}).values()
    )
    assert plan["steps"] == 8  # 24 forget rows, 6 in a step, twice


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (UnlearnFlags(learning_rate=1e-5, set=("lr=1e-4",)), "key lr has two values, from --set lr=1e-4 and from --l"),
        (UnlearnFlags(batch_size=4, set=("forget_rows=5",)), "key forget_rows has two values"),
        (UnlearnFlags(epochs=4.0, set=("epochs=5",)), "key epochs has two values"),
        (UnlearnFlags(set=("lr=1", "lr=2")), "from --set lr=1 and from --set lr=2; leave one"),
    ],
)
def test_two_values_of_a_key_are_refused(flags, words):
    with pytest.raises(NekoLeanError, match=re.escape(words)):
        flags.overrides()


def test_the_batch_size_that_is_planned_is_the_one_of_the_recipes_command():
    assert PlanFlags(batch_size=2).overrides() == {"forget_rows": 2}
    assert PlanFlags(recipe="memorize", batch_size=2, state_bits=8).overrides() == {"retain_rows": 2, "state_bits": 8}
    with pytest.raises(NekoLeanError, match="key retain_rows has two values"):
        PlanFlags(recipe="memorize", batch_size=2, set=("retain_rows=3",)).overrides()


# Checks before any work


def unreachable(*args, **kwargs):
    raise AssertionError("a model or data was read")


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Make every function that reads a model, a tokenizer or data fail."""
    for module in (neko_lean.runs.unlearning, neko_lean.runs.memorizing, neko_lean.cache.writer, neko_lean.scoring.job):
        for name in ("load_model", "load_tokenizer", "read_rows", "read_cache_data", "read_data", "model_folder"):
            monkeypatch.setattr(module, name, unreachable, raising=False)
    monkeypatch.setattr(neko_lean.runs.training_run, "model_folder", unreachable)


def commands(world, model, out):
    """Each command that reads a model, without the options under test."""
    data = ("--forget", world, "--retain", world)
    return {
        "cache-teacher": ("cache-teacher", model, world, "--out", out),
        "unlearn": ("unlearn", model, *data, "--out", out),
        "memorize": ("memorize", model, "--data", world, "--out", out),
        "score": ("score", model, "--data", world, "--out", out),
    }


COMMANDS = ("cache-teacher", "unlearn", "memorize", "score")


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_and_devices_are_checked_before_anything_is_read(
    nothing_is_read, no_gpu, world, model, tmp_path, command
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    for out, words in (
        ("file", "is a file, not a folder"),
        ("full", "already holds something"),
        ("file/inside", "is a file; choose another --out"),
        ("x" * 300, "choose a shorter --out"),
    ):
        result = call(*commands(world, model, tmp_path / out)[command])
        assert result.exit_code == 2 and words in result.stderr, result.output
    result = call(*commands(world, model, tmp_path / "out")[command], "--device", "cuda")
    assert result.exit_code == 2 and "PyTorch finds no GPU; use --device cpu" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_folder_is_refused_before_anything_is_read(
    nothing_is_read, monkeypatch, world, model, tmp_path, command
):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    result = call(*commands(world, model, tmp_path / "out")[command])
    assert result.exit_code == 2 and "is read-only; choose another --out" in result.stderr


def test_missing_packages_are_noticed_before_anything_is_read(nothing_is_read, monkeypatch, world, model, tmp_path):
    for package in ("lm_eval", "torchao", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    score, memorize, unlearn = (commands(world, model, tmp_path / "out")[n] for n in ("score", "memorize", "unlearn"))
    hub = ("unlearn", model, "--forget", "no-owner/no-data", "--out", tmp_path / "out")
    for words, package, extra in (
        ((*score, "--lm-eval", "arc_easy"), "lm_eval", "lm-eval"),
        ((*unlearn, "--state-bits", 4), "torchao", "torchao"),
        ((*memorize, "--set", "state_bits=4"), "torchao", "torchao"),
        (hub, "datasets", "hub"),
        (("cache-teacher", model, "no-owner/no-data", "--out", tmp_path / "out"), "datasets", "hub"),
    ):
        result = call(*words)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
        assert f"needs the package {package}" in result.stderr and f"'neko-lean[{extra}]'" in result.stderr


# Messages


def test_quiet_and_verbose_contradict_each_other():
    result = call("recipes", "--quiet", "--verbose")
    assert result.exit_code == 2 and "--quiet and --verbose contradict each other" in result.stderr


def test_verbose_shows_the_time(world, model, tmp_path):
    result = call("cache-teacher", model, world, "--out", tmp_path / "c", "--dry-run", "--verbose")
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert any(re.match(r"\[ *\d+\.\d s\] prompt format: ", line) for line in lines)
    assert any(re.match(r"\[ *\d+\.\d s\] finished after \d+\.\d s$", line) for line in lines)
    again = call("cache-teacher", model, world, "--out", tmp_path / "c", "--dry-run")
    assert "[" not in again.stderr.replace("['", "")


@pytest.mark.slow
def test_stderr_holds_only_lines_of_neko_lean_and_each_once(world, model, cache, tmp_path):
    """Each command as a person starts it, without a terminal: no bar, no warning and no log of a library."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRANSFORMERS_", "PYTHONW"))
    }
    expected = re.compile(
        r"(forget|retain): \d+ rows, |prompt format: |lr: |metrics of each step: |\S+ holds no weights: |"
        r"warning: (steps will be slow|every token|"
        r"without --anchor|score: |the official scores|verdict)|[\w -]+: \d+/\d+ \w+, "  # the last is progress
    )
    few = ("--max-steps", 2, "--batch-size", 4)
    out = {name: tmp_path / name for name in ("cache", "unlearned", "target", "scores", "report.html")}
    for words in (
        ("cache-teacher", model, world, "--forget", world, "--check", 2, "--out", out["cache"]),
        ("unlearn", model, "--forget", world, "--retain", world, *few, "--out", out["unlearned"]),
        ("memorize", world / "base", "--data", world, *few, "--out", out["target"]),
        ("score", model, "--data", world, "--max-new-tokens", 2, "--attack", "quantize", "--out", out["scores"]),
        ("report", out["scores"], "--out", out["report.html"]),
        ("inspect", cache),
        ("plan", model, "--batch-tokens", 256),
        ("recipes", "npo"),
    ):
        command = [sys.executable, "-m", "neko_lean", *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert result.returncode == 0, result.stderr
        lines = result.stderr.splitlines()
        assert len(set(lines)) == len(lines), (words[0], lines)
        assert [line for line in lines if not expected.match(line)] == [], words[0]
