"""Publishing: files that appear at the output's path meanwhile are kept, and a finished result is never lost."""

import errno
import json
import os
from pathlib import Path

import pytest

from neko_lean.errors import NekoLeanError, UnpublishedError
from neko_lean.outputs.lock import locked
from neko_lean.outputs.place import claim_file, claim_folder
from neko_lean.outputs.publish import publish, publish_file, remove_replaced


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


def test_publish_replaces_an_empty_folder_and_an_old_output(tmp_path):
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
def test_files_that_appeared_meanwhile_are_kept_and_the_error_names_the_result(tmp_path, kind, overwrite):
    output = finished(tmp_path, overwrite=overwrite)
    if kind == "file":
        output.path.write_text("mine")
    else:
        write_scores(output.path, "old") if kind != "folder" else output.path.mkdir()
        (output.path / "thesis.txt").write_text("mine")
    with pytest.raises(UnpublishedError) as caught:
        publish(output.work, output)
    message = str(caught.value)
    assert f"it is in {output.work}; move it with mv {output.work} PLACE." in message and "\n" not in message
    assert cells(output.work) == "new" and names(tmp_path) == [".out.partial", "out"]
    assert "mine" in (output.path if kind == "file" else output.path / "thesis.txt").read_text()


def test_a_file_added_to_the_old_output_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    """The file appears between the check of the old output and its rename."""
    write_scores(tmp_path / "out", "old")
    output = finished(tmp_path, overwrite=True)
    rename = Path.rename

    def add_file(self, target):
        if self == output.path:
            (output.path / "thesis.txt").write_text("mine")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", add_file)
    with pytest.raises(UnpublishedError, match=r"holds thesis\.txt"):
        publish(output.work, output)
    assert (output.path / "thesis.txt").read_text() == "mine" and cells(output.work) == "new"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EIO, errno.ENOTDIR, errno.EACCES])
@pytest.mark.parametrize("old", [False, True])
def test_a_failed_move_keeps_both_results(tmp_path, monkeypatch, code, old):
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


def test_the_old_output_of_a_run_killed_after_publishing_is_removed(tmp_path):
    output = finished(tmp_path, overwrite=True)
    publish(output.work, output)
    write_scores(output.old, "old")
    output.lock.touch()
    with locked(output):
        remove_replaced(output)
    assert names(tmp_path) == ["out"] and cells(output.path) == "new"


def test_publish_file_checks_the_path_again(tmp_path):
    output = claim_file(tmp_path / "deep" / "page.html", "--out", [])
    output.path.parent.mkdir()
    (output.path.parent / ".page.html.4321.tmp").touch()  # left by a killed process
    publish_file("<p>", output, "--out")
    assert names(output.path.parent) == ["page.html"]
    with pytest.raises(NekoLeanError, match="already exists"):
        publish_file("<p>", output, "--out")
    assert output.path.read_text() == "<p>"
