"""The commands as a person runs them: help, JSON, exit codes, and silence where it was asked for."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neko_lean.cli import app
from neko_lean.recipe import DEFAULT, FOLDER, recipe_names
from tests.helpers import make_rows, write_rows

COMMANDS = ("cache-teacher", "inspect", "plan", "recipes", "unlearn", "score", "report", "memorize", "demo")


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example: neko-lean {command}" in result.output
    assert "--json" in result.output and "--quiet" in result.output


def test_the_three_commands(world, model, tmp_path):
    """cache-teacher, unlearn, score, each with --json: one object on stdout and nothing else."""
    cached = call("cache-teacher", model, world, "--out", tmp_path / "cache", "--json")
    assert cached.exit_code == 0, cached.output
    manifest = json.loads(cached.stdout)
    assert manifest["rows"] == 36 and manifest["top_k"] == 64 and manifest["max_length"] == 512
    data = ("--forget", world, "--retain", world / "retain.jsonl")
    change = ("--set", "forget_rows=4", "--set", "retain_rows=4", "--max-steps", 2, "--seed", 7)
    run = call("unlearn", model, *data, "--cache", tmp_path / "cache", "--out", tmp_path / "out", *change, "--json")
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["steps"] == 2 and found["seed"] == 7 and found["recipe"]["forget_rows"] == 4
    scored = call("score", tmp_path / "out", "--data", world, "--out", tmp_path / "s", "--max-new-tokens", 4, "--json")
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["final"] is None


def test_unlearn_caches_by_itself_and_some_recipes_need_no_teacher(world, model, tmp_path):
    data = ("--forget", world, "--retain", world, "--max-steps", 2, "--quiet")
    for recipe in ("npo", "graddiff"):
        run = call("unlearn", model, *data, "--recipe", recipe, "--out", tmp_path / recipe)
        assert run.exit_code == 0 and run.stdout == "", run.output
        assert sorted(p.name for p in tmp_path.iterdir() if "cache" in p.name) == []


def test_tables_and_lines_for_people(world, model, tmp_path):
    cached = call("cache-teacher", model, world, "--out", tmp_path / "cache")
    assert re.search(r"36 rows, \d+ positions, .* mean mass in the entries", cached.stdout)
    scored = call("score", model, "--data", world, "--out", tmp_path / "scores", "--max-new-tokens", 4)
    assert "task aggregate" in scored.stdout and "not measured" in scored.stdout
    quiet = call("cache-teacher", model, world, "--out", tmp_path / "quiet", "--quiet")
    assert quiet.exit_code == 0 and quiet.output == ""


def test_plan_and_the_peak_at_the_end_of_unlearn(world, model, cache, tmp_path):
    planned = call("plan", model, "--batch-tokens", 256, "--gpu", "8GB")
    assert planned.exit_code == 0, planned.output
    assert "teacher weights" in planned.stdout and "peak on the device" in planned.stdout
    assert "Fits 8GB less" in planned.stdout and planned.stdout.strip().endswith("without further options.")
    found = json.loads(call("plan", model, "--batch-tokens", 256, "--json").stdout)
    assert found["ways"]["neko-lean"]["peak"] > 0 and len(found["ways"]) == 3
    assert "each of 2 GPUs" in " ".join(call("plan", model, "--batch-tokens", 256, "--gpus", 2).stdout.split())
    wrong = call("plan", model, "--gpu", "large")
    assert wrong.exit_code == 2 and "write it like 8GB" in wrong.output
    data = (
        "--forget",
        world,
        "--retain",
        world,
        "--cache",
        cache,
        "--max-steps",
        2,
        "--train-last",
        1,
        "--recipe",
        "neko",
    )
    run = call("unlearn", model, *data, "--out", tmp_path / "out", "--offload-state", "--offload-activations")
    assert run.exit_code == 0, run.output
    assert re.search(r"peak memory: \d+\.\d\d GiB measured, \d+\.\d\d GiB predicted", run.stdout)
    recipe = json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]
    assert recipe["train_last"] == 1 and recipe["offload_state"] and recipe["offload_activations"]


def test_every_command_is_quiet_or_gives_one_object_where_asked(model):
    quiet = call("plan", model, "--batch-tokens", 256, "--quiet")
    assert quiet.exit_code == 0 and quiet.output == ""
    assert call("recipes", "--quiet").output == ""
    for command in (("plan", model, "--batch-tokens", 256), ("recipes",), ("recipes", "npo")):
        assert isinstance(json.loads(call(*command, "--json").stdout), dict)


def test_inspect_and_check(world, model, tmp_path):
    check = ("--forget", world, "--check", 5)
    cached = call("cache-teacher", model, world, "--out", tmp_path / "cache", *check)
    assert cached.exit_code == 0 and re.search(
        r"check: \d+ rows compared with the live teacher; KL from cache to teacher", cached.stdout
    )
    again = call("cache-teacher", model, world, "--out", tmp_path / "cache", *check, "--resume", "--json")
    assert json.loads(again.stdout)["check"]["rows"] >= 5
    shown = call("inspect", tmp_path / "cache", "--verify")
    assert shown.exit_code == 0 and "every checksum" in shown.stdout and "entries per position" in shown.stdout
    about = json.loads(call("inspect", tmp_path / "cache", "--json").stdout)
    assert about["rows"] == 36 + 24 and about["forget_shards"][0]["rows"] == 48
    assert call("inspect", tmp_path / "cache", "--quiet").output == ""


def test_recipes_are_listed_and_shown(tmp_path):
    listed = call("recipes")
    names = [line.split(":")[0].split(" ")[0] for line in listed.stdout.splitlines()]
    assert listed.exit_code == 0 and names == recipe_names()
    assert f"{DEFAULT} (the default of unlearn)" in listed.stdout
    shown = call("recipes", "npo").stdout
    assert "forget_objective = 'npo'" in shown and "beta = 0.1" in shown and "chunk_rows" not in shown
    assert [one["name"] for one in json.loads(call("recipes", "npo", "dpo", "--json").stdout)["recipes"]] == [
        "npo",
        "dpo",
    ]
    assert "beta" not in call("recipes", "undial").stdout.replace("beta1", "").replace("beta2", "")  # has no effect
    (tmp_path / "mine.toml").write_text((FOLDER / "npo.toml").read_text())
    assert call("recipes", tmp_path / "mine.toml").stdout.startswith("mine: ")
    assert call("recipes", "nope").exit_code == 2


def test_a_csv_file_with_its_own_columns_and_no_retain_set(model, tmp_path):
    """What was recognised is printed once, and the model writes the rows to preserve."""
    data = tmp_path / "tickets.csv"
    data.write_text("q,a,team\nWhere did Foo0 walk?,wood Foo0,north\nWhere did Bar0 walk?,wood Bar0,south\n")
    columns, few = (
        ("--columns", "prompt=q,answer=a,group=team"),
        ("--set", "self_generated=3", "--set", "max_length=32"),
    )
    result = call("unlearn", model, "--forget", data, *columns, *few, "--max-steps", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("forget: 2 rows, q/a -> 2 qa; groups 'north' (1), 'south' (1).") == 1
    assert "self-generated retain set: 3 documents written by the model" in result.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["self_generated"] == 3

    cached = call("cache-teacher", model, data, *columns, "--check", 2, "--out", tmp_path / "cache")
    assert cached.exit_code == 0 and "retain: 2 rows, q/a" in cached.stderr and "check: 2 rows" in cached.stdout
    refused = call("unlearn", model, "--forget", data, "--columns", "promt=q", "--out", tmp_path / "no")
    assert refused.exit_code == 2 and "did you mean 'prompt'" in refused.stderr


def test_memorize(world, tmp_path):
    result = call(
        "memorize", world / "base", "--data", world, "--out", tmp_path / "m", "--max-steps", 2, "--retain-only"
    )
    assert result.exit_code == 0 and "2 steps" in result.stdout
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_bad_input_is_one_sentence_and_exit_code_2(world, model, cache, tmp_path):
    (tmp_path / "bad").mkdir()
    write_rows(tmp_path / "bad" / "retain.jsonl", make_rows("New"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    out = ("--out", tmp_path / "out")
    data = ("--forget", world, "--retain", world)
    neko = (*out, "--recipe", "neko")
    cases = [
        (("cache-teacher", tmp_path / "nowhere", world, *out), "nowhere"),
        (("cache-teacher", model, tmp_path / "bad.csv", *out), "bad.csv"),
        (("cache-teacher", model, world, *out, "--format", "chat"), "chat"),
        (("cache-teacher", model, world, *out, "--top-k", 0), "top_k"),
        (("cache-teacher", model, world, *out, "--mass", 0), "mass"),
        (("cache-teacher", model, world, "--out", tmp_path / "full"), "--overwrite"),
        (("inspect", tmp_path / "full"), "not a complete"),
        (("unlearn", model, *data, "--cache", tmp_path / "none", *out), "none does not exist"),
        (("unlearn", model, "--forget", world, "--retain", tmp_path / "bad", "--cache", cache, *neko), "lacks row"),
        (("unlearn", model, *data, "--cache", cache, *out), "--format plain"),
        (("unlearn", model, *data, "--cache", cache, *out, "--set", "lrr=1"), "lrr"),
        (("unlearn", model, *data, "--cache", cache, *out, "--recipe", "nekoo"), "nekoo"),
        (("unlearn", model, *data, "--cache", cache, *out, "--device", "abacus"), "abacus"),
        (("score", model, "--data", tmp_path / "bad", *out), "forget"),
        (("score", model, "--data", world, "--mia", world, *out), "member.jsonl"),
        (("memorize", tmp_path / "bad", "--data", world, *out), "config.json"),
        (("demo", "--data", tmp_path / "bad", *out), "forget"),
        (("demo", "--recipe", "memorize", *out), "forgets nothing"),
        (("demo", "--split", "train", *out), "--split has no effect"),
        # What the recipe has no use for, whether it exists or not.
        (("unlearn", model, *data, *out, "--recipe", "graddiff", "--cache", tmp_path / "none"), "--cache"),
        (("unlearn", model, *data, *out, "--recipe", "graddiff", "--cache", cache), "has no effect"),
        (("unlearn", model, *data, *neko, "--base-cache", tmp_path / "none"), "--base-cache"),
        (("unlearn", model, *data, *neko, "--set", "retain_objective=none", "--anchor", tmp_path / "none"), "--anchor"),
        (("unlearn", model, *data, *neko, "--set", "retain_objective=none", "--cache", cache), "has no effect"),
        (("unlearn", model, *data, *out, "--set", "level=2.0", "--base-cache", cache), "level has no effect"),
        (("unlearn", model, *data, *out, "--recipe", "memorize"), "forgets nothing"),
        (("unlearn", model, *data, *neko, "--set", "beta=0.5"), "beta = 0.5 has no effect"),
        (("unlearn", model, "--forget", world, "--retain", tmp_path / "none", *out, "--recipe", "graddiff",
          "--set", "retain_objective=none"), "none does not exist"),
        (("unlearn", model, *data, *neko, "--set", "answer_skip=500"), "would forget nothing"),
        (("memorize", model, "--data", world, *out, "--set", "order=chunks"), "order 'chunks' splits the forget set"),
        (("memorize", model, "--data", world, *out, "--set", "substitute=refusal", "--set", "substitute_weight=1.0",
          "--set", "forget_rows=4"), "needs retain_objective ce and neither a forget_objective nor a substitute"),
        (("memorize", model, "--data", world / "forget.jsonl", *out, "--retain-only"), "a folder with retain.*"),
        (("score", model, "--data", world / "forget.jsonl", *out), "is a file"),
        (("score", model, "--data", world, *out, "--seed", 0), "--seed has no effect"),
        (("score", model, "--data", world, *out, "--relearn-lr", 1e-3), "--relearn-lr has no effect"),
        (("score", model, "--data", world, *out, "--shots", 2), "--shots has no effect"),
    ]  # fmt: skip
    for arguments, words in cases:
        result = call(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stdout == "" and words in result.stderr, arguments
        assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
        assert result.stderr.strip().count("\n") == 0, result.stderr
        assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_the_line_that_goes_on(world, model, cache, tmp_path, number):
    """A process as a person starts it; it sends itself the signal in its fourth step."""
    script = (
        "import os, signal, sys; from neko_lean.training import loop; from neko_lean.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the tests may run where they are ignored
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "original = loop.Loop._step\n"
        "def step(self, *rest):\n"
        f"    self.state.step == 3 and '--resume' not in sys.argv and os.kill(os.getpid(), {int(number)})\n"
        "    return original(self, *rest)\n"
        "loop.Loop._step = step\n"
        "main()"
    )
    data = ["--forget", world, "--retain", world, "--cache", cache, "--recipe", "neko"]
    words = [*data, "--max-steps", "6", "--set", "forget_rows=4", "--out", tmp_path / "an out", "--quiet"]
    arguments = ["unlearn", str(model), *map(str, words)]

    def start(given):
        command = [sys.executable, "-c", script, *given]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    stopped = start(arguments)
    assert stopped.returncode == 128 + number and stopped.stdout == "" and "Traceback" not in stopped.stderr
    said, line = stopped.stderr.strip().splitlines()[-2:]
    kept = f"{tmp_path}/.an out.saved keeps the run as of step 4"
    assert said == f"stopped by {number.name} after step 4 of 6; {kept}. Continue with:"
    assert "finishing the step, then saving" in stopped.stderr
    assert line.startswith("  neko-lean unlearn ") and line.endswith(" --resume")
    if number != signal.SIGINT:
        return
    again = start(shlex.split(line)[1:])
    assert again.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["an out"]
    assert json.loads((tmp_path / "an out" / "run.json").read_text())["steps"] == 6


def test_resume_and_save_every_from_the_command_line(world, tmp_path):
    words = ("memorize", world / "base", "--data", world, "--out", tmp_path / "m", "--max-steps", 2, "--save-every", 1)
    assert call(*words).exit_code == 0
    again = call(*words, "--resume")
    assert again.exit_code == 0 and "is complete: nothing to do" in again.output
    help = call("unlearn", "--help").output
    assert "--save-every" in help and "--resume" in help


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, -(2**63) - 1, 10**40])
def test_seeds_out_of_range_are_refused_before_any_work(tmp_path, seed):
    out = ("--out", tmp_path / "out", "--seed", seed)
    for words in (
        ("unlearn", "nothing", "--forget", "x", "--retain", "y", *out),
        ("memorize", "nothing", "--data", "x", *out),
        ("score", "nothing", "--data", "x", "--attack", "relearn", *out),
        ("demo", *out),
    ):
        result = call(*words)
        assert result.exit_code == 2 and result.stderr.startswith("error: seed must be an integer from 0 to"), words
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "device", ["cuda:99", "cpu:3", "mps", "xpu", "meta", "", "CPU", "cuda:", "cuda:-1", "cuda:1e9"]
)
def test_unknown_devices_are_refused(world, model, tmp_path, device):
    out = ("--out", tmp_path / "out", "--device", device)
    for words in (
        ("unlearn", model, "--forget", world, "--retain", world, *out),
        ("memorize", model, "--data", world, *out),
        ("score", model, "--data", world, *out),
        ("cache-teacher", model, world, *out),
        ("demo", *out),
    ):
        result = call(*words)
        assert result.exit_code == 2 and result.stderr.startswith(f"error: device {device!r} "), (words, result.stderr)
        assert not (tmp_path / "out").exists()
