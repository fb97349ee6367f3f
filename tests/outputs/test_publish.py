"""The last rename: what appeared meanwhile stays, and a finished result is never lost."""

import errno
import json
import os
from pathlib import Path

import pytest

from neko_lean.errors import NekoLeanError, UnpublishedError
from neko_lean.outputs.lock import locked
from neko_lean.outputs.place import claim_file, claim_folder
from neko_lean.outputs.publish import clear_work, publish, publish_file, remove_replaced, staged_folder


def write_scores(folder, text="{}"):
    folder.mkdir(exist_ok=True)
    (folder / "scores.json").write_text(json.dumps({"cells": text, "verdict": []}))


def finished(tmp_path, **options):
    output = claim_folder(tmp_path / "out", "partial", [], **options)
    write_scores(output.work, "new")
    return output


def cells(folder):
    return json.loads((folder / "scores.json").read_text())["cells"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_takes_the_place_of_nothing_of_an_empty_folder_and_of_an_old_output(tmp_path):
    publish(finished(tmp_path).work, claim_folder(tmp_path / "out", "partial", []))
    assert names(tmp_path) == ["out"] and cells(tmp_path / "out") == "new"
    write_scores(tmp_path / "out", "old")
    output = finished(tmp_path, overwrite=True)
    publish(output.work, output)
    assert names(tmp_path) == ["out"] and cells(tmp_path / "out") == "new"
    (tmp_path / "b").mkdir()
    empty = claim_folder(tmp_path / "b", "partial", [])
    write_scores(empty.work, "new")
    publish(empty.work, empty)
    assert names(tmp_path) == ["b", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "our output with more in it"])
def test_what_appeared_meanwhile_stays_and_the_result_is_named(tmp_path, kind, overwrite):
    output = finished(tmp_path, overwrite=overwrite)
    if kind == "file":
        output.path.write_text("mine")
    else:
        write_scores(output.path, "old") if kind != "folder" else output.path.mkdir()
        (output.path / "thesis.txt").write_text("mine")
    with pytest.raises(UnpublishedError) as caught:
        publish(output.work, output)
    said = str(caught.value)
    assert f"it is in {output.work}; move it with mv {output.work} PLACE." in said and "\n" not in said
    assert cells(output.work) == "new" and names(tmp_path) == [".out.partial", "out"]
    assert "mine" in (output.path if kind == "file" else output.path / "thesis.txt").read_text()


def test_something_put_into_an_old_output_at_the_last_moment_stays(tmp_path, monkeypatch):
    """Between the look at it and the move."""
    write_scores(tmp_path / "out", "old")
    output = finished(tmp_path, overwrite=True)
    rename = Path.rename

    def late(self, target):
        if self == output.path:
            (output.path / "thesis.txt").write_text("mine")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(UnpublishedError, match=r"holds thesis\.txt"):
        publish(output.work, output)
    assert (output.path / "thesis.txt").read_text() == "mine" and cells(output.work) == "new"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EIO, errno.ENOTDIR, errno.EACCES])
@pytest.mark.parametrize("old", [False, True])
def test_a_move_that_fails_keeps_both_results(tmp_path, monkeypatch, code, old):
    if old:
        write_scores(tmp_path / "out", "old")
    output = finished(tmp_path, overwrite=True)
    rename = Path.rename

    def failing(self, target):
        if self == output.work:
            raise OSError(code, os.strerror(code), str(self))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(UnpublishedError, match=os.strerror(code)):
            publish(output.work, output)
    assert cells(output.work) == "new" and (not old or cells(output.path) == "old")
    publish(output.work, output)
    assert cells(output.path) == "new" and names(tmp_path) == ["out"]


def test_a_staged_folder_is_there_whole_or_not_at_all(tmp_path):
    with staged_folder(tmp_path / "out") as stage:
        (stage / "data").mkdir()
        assert names(tmp_path) == [".out.demo", ".out.lock"]
    assert names(tmp_path) == ["out"]
    with pytest.raises(NekoLeanError, match="already holds something"), staged_folder(tmp_path / "out"):
        pass
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "two") as stage:
        (stage / "data").mkdir()
        raise ZeroDivisionError
    with pytest.raises(NekoLeanError, match="No space left"), staged_folder(tmp_path / "two"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == ["out"]


def test_a_finished_stage_outlives_a_place_that_is_taken(tmp_path):
    with pytest.raises(UnpublishedError), staged_folder(tmp_path / "out") as stage:
        (stage / "data").mkdir()
        (tmp_path / "out").write_text("mine")
    assert names(tmp_path) == [".out.demo", "out"] and names(stage) == ["data"]


def test_what_a_killed_run_left_is_cleared_and_nothing_else(tmp_path):
    stage = tmp_path / ".out.demo"
    (stage / "target").mkdir(parents=True)
    (stage / ".unlearned-neko.saved").mkdir()
    with staged_folder(tmp_path / "out"):
        assert names(stage) == []
    (tmp_path / "out").rmdir()
    stage.mkdir()
    (stage / "thesis.txt").touch()
    with (
        pytest.raises(NekoLeanError, match=r"holds thesis\.txt, which neko-lean did not write: move it away"),
        staged_folder(tmp_path / "out"),
    ):
        pass
    assert names(stage) == ["thesis.txt"]
    output = claim_folder(tmp_path / "two", "partial", [], overwrite=True)
    output.work.mkdir()
    (output.work / "plan.json").symlink_to(stage / "thesis.txt")
    with pytest.raises(NekoLeanError, match="is a link"):
        clear_work(output)
    assert (stage / "thesis.txt").exists()


def test_what_a_run_left_that_was_killed_after_its_end_goes(tmp_path):
    output = finished(tmp_path, overwrite=True)
    publish(output.work, output)
    write_scores(output.old, "old")
    output.lock.touch()
    with locked(output):
        remove_replaced(output)
    assert names(tmp_path) == ["out"] and cells(output.path) == "new"


def test_a_file_is_checked_again_at_the_end(tmp_path):
    output = claim_file(tmp_path / "deep" / "page.html", "--out", [])
    output.path.parent.mkdir()
    (output.path.parent / ".page.html.4321.tmp").touch()  # of a process that was killed
    publish_file("<p>", output, "--out")
    assert names(output.path.parent) == ["page.html"]
    with pytest.raises(NekoLeanError, match="already exists"):
        publish_file("<p>", output, "--out")
    assert output.path.read_text() == "<p>"
