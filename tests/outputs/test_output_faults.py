"""Faults of outputs, for every command that writes: paths that it must not or cannot write to, and interrupted runs.

Each test checks that the command exits with code 2 and a one-sentence error, that the user's files are unchanged, and
that a finished or partial result is kept and can be completed with --resume.
"""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neko_lean.cache import planning, records, writer
from neko_lean.cache import stage as cache_stage
from neko_lean.checkpoints import run_folder as training
from neko_lean.cli import app
from neko_lean.outputs import place as place_module
from neko_lean.outputs import work_folder as work_folder_module
from neko_lean.outputs.lock import locked
from neko_lean.outputs.place import claim_folder
from neko_lean.scoring import measure
from neko_lean.scoring import run as run_module
from neko_lean.scoring import score_folder as scoring
from tests.checkpoints.interrupted import Killed, kill_at, result
from tests.helpers import make_cache

COMMANDS = ("cache-teacher", "unlearn", "memorize", "score")
ALL = (*COMMANDS, "demo")
MODULE = {"cache-teacher": cache_stage, "unlearn": training, "memorize": training, "score": scoring}
STAGE = {"cache-teacher": "partial", "unlearn": "saved", "memorize": "saved", "score": "partial", "demo": "demo"}
SMALL = ("--set", "forget_rows=4", "--set", "retain_rows=4", "--max-steps", 2)


@pytest.fixture
def arguments(world, model, cache, monkeypatch):
    """The arguments of a short run of each command, without --out."""
    monkeypatch.setattr(planning, "SHARD_POSITIONS", 100)
    return {
        "cache-teacher": (model, world, "--batch-tokens", 256, "--dtype", "float32"),
        "unlearn": (model, "--forget", world, "--retain", world, "--cache", cache, "--recipe", "neko", *SMALL),
        "memorize": (model, "--data", world, "--set", "retain_rows=8", "--max-steps", 2),
        "score": (model, "--data", world, "--max-new-tokens", 2, "--batch-size", 8),
        "demo": ("--data", world, "--max-steps", 1),
    }


@pytest.fixture
def run(arguments):
    def run(command, out, *options):
        given = [command, *arguments[command], "--out", out, "--quiet", *options]
        return CliRunner().invoke(app, [str(argument) for argument in given])

    return run


def assert_refused(outcome, *words):
    """Check for exit code 2 and a one-sentence error that contains these words, and return the error."""
    assert outcome.exit_code == 2, (outcome.output, outcome.exception)
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in outcome.stderr and outcome.stdout == ""
    for word in words:
        assert word in errors[0], errors[0]
    return errors[0]


def snapshot(folder):
    """The content of a folder: names, file contents, and targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path)  # noqa: PTH115
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def interrupt(command, run, out, monkeypatch, *options):
    """Interrupt a run when its work folder has something to resume from, and return the work folder."""
    with monkeypatch.context() as patch:
        if command == "cache-teacher":
            write, count = records.write_atomically, []

            def dying(path, data):
                write(path, data)
                count.append(path)
                if len(count) == 6:
                    raise Killed

            patch.setattr(records, "write_atomically", dying)
        elif command == "score":
            add = measure.add_generations

            def dying_later(*given):
                add(*given)
                raise Killed

            patch.setattr(measure, "add_generations", dying_later)
        else:
            kill_at(patch, 2)
        with pytest.raises(Killed):
            run(command, out, *options, *(("--save-every", 1) if STAGE[command] == "saved" else ()))
    stage = out.with_name(f".{out.name}.{STAGE[command]}")
    assert stage.is_dir()
    return stage


def same_result(command, first, second):
    if STAGE[command] == "saved":
        return result(first) == result(second)
    if command == "cache-teacher":
        return snapshot(first) == snapshot(second)
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (first, second)]
    for outcome in scores:
        del outcome["wall_seconds"], outcome["peak_memory"]
    return scores[0] == scores[1] and snapshot(first)["generations.jsonl"] == snapshot(second)["generations.jsonl"]


# Before any work


@pytest.mark.parametrize("command", ALL)
def test_a_folder_of_the_user_is_never_replaced(run, tmp_path, command):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    (mine / "forget.jsonl").write_text("{}")
    before = snapshot(tmp_path)
    assert_refused(run(command, mine), "already holds something")
    assert_refused(run(command, mine, "--overwrite"), "replaces only folders that neko-lean wrote")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ALL)
def test_an_output_must_not_be_an_input(run, arguments, world, model, cache, tmp_path, command, monkeypatch):
    """The run's data, its model, or a folder above them, in any spelling and through links."""
    root = tmp_path / "a"
    for name, source in (("data", world), ("model", model), ("cache", cache)):
        shutil.copytree(source, root / name)
        (root / name / "scores.json").write_text('{"cells": {}, "verdict": []}')  # as if neko-lean had written it
    moved = {str(world): root / "data", str(model): root / "model", str(cache): root / "cache"}
    arguments[command] = tuple(moved.get(str(argument), argument) for argument in arguments[command])
    (tmp_path / "link").symlink_to(root / "data")
    (tmp_path / "up").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    before = snapshot(root)
    inputs = ["data"] if command == "demo" else ["data", "model", *(["cache"] if command == "unlearn" else [])]
    places = [root / name for name in inputs] + [root, "a", "link", "up/data", "a/../a/data", "a/data/"]
    for place in places:
        assert_refused(run(command, place, "--overwrite"), "an input of this run")
    assert snapshot(root) == before and sorted(path.name for path in tmp_path.iterdir()) == ["a", "link", "up"]


@pytest.mark.parametrize("command", ALL)
def test_a_path_that_nothing_can_be_moved_to_is_refused_first(run, tmp_path, command, monkeypatch):
    (tmp_path / "volume").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "mountinfo").write_text(f"36 35 98:0 / {tmp_path}/volume rw - ext4 /dev/sda rw\n")
    monkeypatch.setattr(place_module, "_MOUNTS", tmp_path / "mountinfo")
    before = snapshot(tmp_path)
    for place, words in (
        (tmp_path / "volume", "is a mount point"),
        (tmp_path / ("x" * 250), "choose a shorter --out"),
        (tmp_path / ("x" * 300), "choose a shorter --out"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "is a file"),
        (tmp_path / "round", "link"),
        ("/", "root of the file system"),
    ):
        assert_refused(run(command, place), words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dangling_link_is_followed(run, tmp_path, command):
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "new")
    outcome = run(command, tmp_path / "link")
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "link").is_symlink() and any((tmp_path / "deep" / "new").iterdir())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]


@pytest.mark.parametrize("command", ALL)
def test_an_output_that_another_process_is_writing_is_refused(run, tmp_path, command):
    with locked(claim_folder(tmp_path / "out", STAGE[command], [])):
        for options in ((), ("--overwrite",), *([("--resume",)] if command != "demo" else [])):
            assert_refused(
                run(command, tmp_path / "out", *options), "another process is writing", "choose another --out"
            )
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


# At the end


@pytest.mark.parametrize("fault", ["a folder appears", "a file appears", "a busy place"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_finished_result_survives_a_failed_move(run, tmp_path, command, fault, monkeypatch):
    out, kept, publish = tmp_path / "out", [], MODULE[command].publish

    def hindered(stage, output):
        kept.append(stage)
        if fault == "a busy place":
            rename = Path.rename

            def busy(self, target):
                if self == stage:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
                return rename(self, target)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "rename", busy)
                publish(stage, output)
        elif fault == "a file appears":
            out.write_text("mine")
        else:
            out.mkdir()
            (out / "thesis.txt").write_text("mine")
        publish(stage, output)

    with monkeypatch.context() as patch:
        patch.setattr(MODULE[command], "publish", hindered)
        options = ("--overwrite",) if fault == "a folder appears" else ()
        assert_refused(
            run(command, out, *options), "the result is complete", f"it is in {kept[0] if kept else out.parent}"
        )
    assert any(kept[0].iterdir())
    if fault != "a busy place":
        assert "mine" in (out if out.is_file() else out / "thesis.txt").read_text()
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    again = run(command, out, "--resume")
    assert again.exit_code == 0, again.output
    assert run(command, tmp_path / "whole").exit_code == 0
    assert same_result(command, out, tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    # Resuming again does nothing.
    before = snapshot(out)
    assert run(command, out, "--resume").exit_code == 0 and snapshot(out) == before


# Interrupted runs

OTHER = {
    "cache-teacher": (("--top-k", 5), "another top_k"),
    "unlearn": (("--seed", 5), "another seed (0, now 5)"),
    "memorize": (("--seed", 5), "another seed (0, now 5)"),
    "score": (("--max-new-tokens", 3), "another max_new_tokens"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_resume_with_another_option_deletes_nothing(run, tmp_path, command, monkeypatch):
    out = tmp_path / "out"
    stage = interrupt(command, run, out, monkeypatch)
    before = snapshot(stage)
    option, words = OTHER[command]
    assert_refused(run(command, out, "--resume", *option), words, "start anew with --overwrite")
    assert snapshot(stage) == before
    assert_refused(run(command, out), "--resume")
    assert snapshot(stage) == before
    assert run(command, out, "--resume").exit_code == 0
    assert run(command, tmp_path / "whole").exit_code == 0
    assert same_result(command, out, tmp_path / "whole")


def die(*_):
    raise Killed


@pytest.mark.parametrize("command", COMMANDS)
def test_another_run_does_not_remove_a_finished_result(run, tmp_path, command, monkeypatch):
    """The run was killed just before its last move. Neither other options nor another command may remove its result."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(MODULE[command], "publish", die)
        with pytest.raises(Killed):
            run(command, out)
    stage = tmp_path / f".out.{STAGE[command]}"
    before = snapshot(stage)
    other = {"cache-teacher": "score", "score": "cache-teacher", "unlearn": "memorize", "memorize": "unlearn"}[command]
    assert_refused(run(other, out, "--resume"), str(stage), "start anew with --overwrite")
    assert snapshot(stage) == before
    assert_refused(run(command, out, "--resume", *OTHER[command][0]), str(stage), "start anew with --overwrite")
    assert snapshot(stage) == before
    assert run(command, out, "--resume").exit_code == 0
    assert run(command, tmp_path / "whole").exit_code == 0
    assert same_result(command, out, tmp_path / "whole")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_replaces_an_output_can_be_resumed(run, tmp_path, command, monkeypatch):
    out = tmp_path / "out"
    assert run(command, out, *OTHER[command][0]).exit_code == 0
    interrupt(command, run, out, monkeypatch, "--overwrite")
    assert run(command, out, "--resume", "--overwrite").exit_code == 0
    assert run(command, tmp_path / "whole").exit_code == 0
    assert same_result(command, out, tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("command", COMMANDS)
def test_resuming_a_complete_output_removes_the_work_folder_of_the_same_run(run, tmp_path, command, monkeypatch):
    out = tmp_path / "out"
    assert run(command, out).exit_code == 0
    stage, before = interrupt(command, run, out, monkeypatch, "--overwrite"), snapshot(out)
    assert run(command, out, "--resume").exit_code == 0
    assert not stage.exists() and snapshot(out) == before
    # The work folder of another run is kept.
    interrupt(command, run, out, monkeypatch, "--overwrite", *OTHER[command][0])
    assert run(command, out, "--resume").exit_code == 0
    assert stage.exists() and snapshot(out) == before


@pytest.mark.parametrize("change", [(), ("--top-k", 5)])
def test_a_cache_that_another_process_has_completed_is_not_written_again(run, tmp_path, monkeypatch, change):
    out, locked_, others = tmp_path / "out", work_folder_module.locked, []

    @contextmanager
    def late(output):
        others.append(output)
        if len(others) == 1:
            assert run("cache-teacher", out, *change).exit_code == 0
            monkeypatch.setattr(writer, "_write_shards", die)
        with locked_(output):
            yield

    monkeypatch.setattr(work_folder_module, "locked", late)
    outcome = run("cache-teacher", out, "--resume")
    if change:
        assert_refused(outcome, "another top_k")
    else:
        assert outcome.exit_code == 0, outcome.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_cache_teacher_returns_its_own_manifest(arguments, tmp_path, monkeypatch, run):
    """Another run replaces the output as soon as the lock is released."""
    out, locked_, others = tmp_path / "out", work_folder_module.locked, []

    @contextmanager
    def then_another(output):
        with locked_(output):
            yield
        if out.exists() and not others:
            others.append(output)
            assert run("cache-teacher", out, "--top-k", 5, "--overwrite").exit_code == 0

    monkeypatch.setattr(work_folder_module, "locked", then_another)
    model, world, *_ = arguments["cache-teacher"]
    assert make_cache(model, world, out, dtype="float32").top_k == 64
    assert others and json.loads((out / "manifest.json").read_text())["top_k"] == 5


@pytest.mark.parametrize("again", [(), ("--resume",)])
def test_official_results_belong_to_this_score(run, tmp_path, monkeypatch, again):
    """Another run replaces the score before its official results are written."""
    out, official, wanted = tmp_path / "out", tmp_path / "official.json", tmp_path / "wanted.json"
    assert run("score", tmp_path / "whole", "--official", wanted).exit_code == 0
    if again:
        assert run("score", out).exit_code == 0
    for name in ("finished_score", "open_score_folder"):
        original = getattr(run_module, name)
        monkeypatch.setattr(run_module, name, followed_by(original, lambda: replace_lines(out)))
    outcome = run("score", out, "--official", official, *again)
    if outcome.exit_code == 0:
        assert json.loads(official.read_text()) == json.loads(wanted.read_text())
    else:
        assert_refused(outcome, "was replaced by another run")
        assert not official.exists()


def replace_lines(out):
    """Write the output that another run with other options would leave, with other points."""
    if (out / "scores.json").is_file():
        scores = json.loads((out / "scores.json").read_text())
        (out / "scores.json").write_text(json.dumps({**scores, "made_from": "another"}))
        lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
        lines = [{**line, "score": 1 - line["score"]} for line in lines]
        (out / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def followed_by(original, then):
    """Wrap a function or a context manager so that `then` is called after it."""

    def wrapped(*arguments, **options):
        outcome = original(*arguments, **options)
        if not hasattr(outcome, "__enter__"):
            then()
            return outcome
        return leaving(outcome, then)

    return wrapped


@contextmanager
def leaving(manager, then):
    with manager as outcome:
        yield outcome
    then()


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_the_user_in_a_work_folder_is_kept(run, tmp_path, command, option, monkeypatch):
    out = tmp_path / "out"
    stage = interrupt(command, run, out, monkeypatch)
    (stage / "thesis.txt").write_text("all of it")
    before = snapshot(stage)
    assert_refused(run(command, out, option), "holds thesis.txt, which neko-lean did not write")
    assert snapshot(stage) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_no_link_in_a_work_folder_is_followed(run, tmp_path, command, monkeypatch):
    """Everything in the work folder, the work folder itself, and its lock are replaced by links in turn."""
    out, away = tmp_path / "out", tmp_path / "away"
    stage = interrupt(command, run, out, monkeypatch)
    for number, name in enumerate(sorted(path.name for path in stage.iterdir())):
        elsewhere = tmp_path / f"elsewhere{number}"
        (stage / name).rename(elsewhere)
        (stage / name).symlink_to(elsewhere)
        for path in (elsewhere, *elsewhere.rglob("*")):
            path.touch()
        before = snapshot(tmp_path)
        for option in ("--resume", "--overwrite"):
            assert_refused(run(command, out, option), "is a link")
        assert snapshot(tmp_path) == before, name
        (stage / name).unlink()
        elsewhere.rename(stage / name)
    stage.rename(away)
    stage.symlink_to(away)
    before = snapshot(away)
    for option in ("--resume", "--overwrite"):
        assert_refused(run(command, out, option), "is a link")
    assert snapshot(away) == before
    stage.unlink()
    away.rename(stage)
    (tmp_path / "theirs").write_text("all of it")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "theirs")
    assert_refused(run(command, out, "--resume"), "is a link")
    assert (tmp_path / "theirs").read_text() == "all of it"
    (tmp_path / ".out.lock").unlink()
    assert run(command, out, "--resume").exit_code == 0


@pytest.mark.parametrize("name", ["generations.jsonl", "plan.json"])
def test_hard_links_to_files_in_a_work_folder_are_not_changed(run, tmp_path, name, monkeypatch):
    out = tmp_path / "out"
    stage = interrupt("score", run, out, monkeypatch)
    os.link(stage / name, tmp_path / "mine")
    before = (tmp_path / "mine").read_bytes()
    assert run("score", out, "--resume").exit_code == 0
    assert (tmp_path / "mine").read_bytes() == before


# Errors of the operating system


@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_while_writing_is_one_sentence(run, tmp_path, command, code, monkeypatch):
    def failing(file):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        message = assert_refused(run(command, tmp_path / "out"), str(tmp_path / "out"))
    assert os.strerror(code) in message or "No space left" in message or "quota" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_parent_that_vanishes_is_one_sentence(run, tmp_path, command, monkeypatch):
    parent, publish = tmp_path / "parent", MODULE[command].publish

    def vanishing(stage, output):
        shutil.rmtree(parent)
        publish(stage, output)

    monkeypatch.setattr(MODULE[command], "publish", vanishing)
    assert_refused(run(command, parent / "out"), "No such file or directory")


def test_other_files_that_score_and_report_write_are_checked_first(run, tmp_path):
    (tmp_path / "theirs.json").write_text("{}")
    out = tmp_path / "out"
    for official, words in (
        (tmp_path / "theirs.json", "already exists"),
        (tmp_path, "is a folder"),
        (tmp_path / "theirs.json" / "x", "is a file"),
        (tmp_path / ("x" * 300), "shorter"),
        (out / "scores.json", "score itself writes"),
    ):
        assert_refused(run("score", out, "--official", official), words)
    assert_refused(
        run("score", out, "--official", tmp_path / "theirs.json", "--overwrite"), "was not written by neko-lean"
    )
    assert not out.exists() and (tmp_path / "theirs.json").read_text() == "{}"
    outcome = run("score", out, "--official", out / "official.json")
    assert outcome.exit_code == 0, outcome.output
    assert "aggregated-terms" in json.loads((out / "official.json").read_text())
    (out / "official.json").unlink()
    # A run that was killed before it wrote this file writes it when it is resumed.
    assert run("score", out, "--official", tmp_path / "official.json", "--resume").exit_code == 0
    assert (tmp_path / "official.json").is_file() and run("score", out, "--overwrite").exit_code == 0
    report = CliRunner().invoke(app, ["report", str(out), "--out", str(tmp_path / "theirs.json"), "--overwrite"])
    assert_refused(report, "was not written by neko-lean")
