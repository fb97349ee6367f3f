"""Dry runs: the numbers are those of the run itself, the same input is refused, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neko_lean.cli import app
from tests.helpers import make_rows, write_rows


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def files(*folders):
    """Every file and folder with the time of its last change."""
    return {path: path.lstat().st_mtime_ns for folder in folders for path in (folder, *Path(folder).rglob("*"))}


def plan_of(*words):
    result = call(*words, "--dry-run", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--set", "order=alternating"), ("--recipe", "mismatch")])
def test_unlearn_takes_the_steps_and_the_memory_that_were_planned(world, model, tmp_path, options):
    few = ("--batch-size", 4, "--max-steps", 4, "--seed", 3)
    words = ("unlearn", model, "--forget", world, "--retain", world, "--out", tmp_path / "o", *few, *options)
    plan = plan_of(*words)
    assert list(tmp_path.iterdir()) == []
    run = json.loads(call(*words, "--json").stdout)
    for key in ("steps", "forget_rows", "retain_rows", "rows_truncated", "recipe", "device", "predicted_peak"):
        assert plan[key] == run[key], key


def test_memorize_by_epochs_takes_the_steps_that_were_planned(world, tmp_path):
    words = ("memorize", world / "base", "--data", world, "--out", tmp_path / "o", "--epochs", 0.1)
    plan, run = plan_of(*words), json.loads(call(*words, "--json").stdout)
    assert plan["steps"] == run["steps"] == 1
    assert plan["predicted_peak"] == run["predicted_peak"] and plan["retain_rows"] == 60


def test_rows_that_the_model_has_yet_to_write_are_counted_at_their_maximum_length(world, model, tmp_path):
    few = ("--set", "self_generated=3", "--set", "max_length=32", "--max-steps", 1)
    plan = plan_of("unlearn", model, "--forget", world, "--out", tmp_path / "o", *few)
    assert plan["self_generated"] == plan["retain_rows"] == 3
    assert (
        plan["largest_step"][-1][1] == 32
        and sum(rows for rows, _ in plan["largest_step"]) == 12 + 3
        and plan["predicted_peak"] > 0
    )


def test_nothing_is_written_by_any_command(world, model, cache, tmp_path):
    before = files(world, model, cache, tmp_path)
    data = ("--forget", world, "--retain", world)
    for words in (
        ("cache-teacher", model, world, "--forget", world),
        ("cache-teacher", model, "--self-generated", 2),
        ("unlearn", model, *data, "--recipe", "neko", "--cache", cache, "--save-every", 1),
        ("memorize", model, "--data", world),
        ("score", model, "--data", world, "--official", tmp_path / "official.json"),
    ):
        result = call(*words, "--out", tmp_path / "new" / "out", "--dry-run")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("dry run: everything was checked, and nothing was written.\n")
        assert f"  output: {tmp_path / 'new' / 'out'}\n" in result.stdout
    assert files(world, model, cache, tmp_path) == before


def test_a_dry_run_refuses_what_the_run_refuses(world, model, cache, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    other = write_rows(tmp_path / "other.jsonl", make_rows("New"))
    out = ("--out", tmp_path / "out")
    neko = ("--recipe", "neko", "--cache", cache)
    for words, sentence in (
        (("unlearn", model, "--forget", world, "--retain", other, *neko, *out), "lacks row"),
        (("unlearn", model, "--forget", world, "--retain", world, "--out", tmp_path / "full"), "already holds"),
        (("unlearn", model, "--forget", world, "--retain", world, *out, "--lr", 0), "lr must be > 0"),
        (("memorize", model, "--data", tmp_path, *out), "forget"),
        (("cache-teacher", model, tmp_path / "none.jsonl", *out), "none.jsonl"),
        (("score", model, "--data", world, "--out", tmp_path / "full"), "already holds"),
    ):
        result = call(*words, "--dry-run")
        assert result.exit_code == 2 and sentence in result.stderr, result.output


def test_an_unfinished_run_is_in_the_way_of_a_dry_run_too(world, model, tmp_path):
    words = ("unlearn", model, "--forget", world, "--retain", world, "--out", tmp_path / "o", "--dry-run")
    save = tmp_path / ".o.saved" / "step-00000002"
    save.mkdir(parents=True)
    result = call(*words)
    assert result.exit_code == 2 and "continue with --resume, or start anew with --overwrite" in result.stderr
    assert call(*words, "--overwrite").exit_code == 0 and save.is_dir()


def test_a_dry_run_leaves_a_finished_run_where_it_is(world, model, cache, tmp_path):
    unlearn = ("unlearn", model, "--forget", world, "--retain", world, "--recipe", "neko", "--cache", cache)
    for words, work in (
        ((*unlearn, "--max-steps", 1, "--set", "dtype=float32"), tmp_path / ".out.saved" / "complete"),
        (("score", model, "--data", world, "--max-new-tokens", 2), tmp_path / ".out.partial"),
    ):
        out = tmp_path / "out"
        assert call(*words, "--out", out).exit_code == 0
        work.parent.mkdir(exist_ok=True)
        out.rename(work)  # where an interruption before the last move leaves the output
        before = files(tmp_path)
        result = call(*words, "--out", out, "--resume", "--dry-run")
        assert result.exit_code == 0, result.output
        assert files(tmp_path) == before
        assert call(*words, "--out", out, "--resume").exit_code == 0 and not work.exists()
        shutil.rmtree(out)
