"""Work folders: published as a whole, kept or removed after an error, and cleared without touching other files."""

import errno

import pytest

from neko_lean.errors import NekoLeanError, UnpublishedError
from neko_lean.outputs.place import claim_folder
from neko_lean.outputs.work_folder import clear_work, keep_or_discard, open_work_folder, staged_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_prepare_runs_under_the_lock_after_an_interrupted_replacement_is_restored(tmp_path):
    output = claim_folder(tmp_path / "out", "partial", [], overwrite=True)
    output.old.mkdir()
    (output.old / "scores.json").write_text('{"cells": {}, "verdict": []}')

    def prepare():
        assert output.lock.is_file() and names(output.path) == ["scores.json"]
        output.work.mkdir()
        return True

    with open_work_folder(output, prepare, pytest.fail) as has_work:
        assert has_work and names(tmp_path) == [".out.lock", ".out.partial", "out"]
    assert names(tmp_path) == [".out.partial", "out"]


def test_nothing_to_do_needs_no_work_folder(tmp_path):
    output = claim_folder(tmp_path / "out", "partial", [])
    with open_work_folder(output, lambda: False, pytest.fail) as has_work:
        assert not has_work and names(tmp_path) == [".out.lock"]
    assert names(tmp_path) == []


def test_an_error_in_the_block_is_handled_under_the_lock(tmp_path):
    output, errors = claim_folder(tmp_path / "out", "partial", []), []

    def prepare():
        output.work.mkdir()
        return True

    def on_error(error):
        assert output.lock.is_file()
        errors.append(error)

    with pytest.raises(ZeroDivisionError), open_work_folder(output, prepare, on_error):
        raise ZeroDivisionError
    assert [type(error) for error in errors] == [ZeroDivisionError] and not output.lock.exists()


def test_an_error_in_prepare_is_a_sentence_about_the_output(tmp_path):
    output = claim_folder(tmp_path / "out", "partial", [])

    def prepare():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NekoLeanError, match=f"No space left .* {output.path}"), open_work_folder(output, prepare, None):
        pass
    assert names(tmp_path) == []


def test_after_an_error_only_a_folder_worth_resuming_is_kept(tmp_path, capsys):
    folder = tmp_path / "work"
    folder.mkdir()
    keep_or_discard(folder, ValueError(), "2 shards")
    assert f"{folder} keeps 2 shards: continue with --resume." in capsys.readouterr().err
    keep_or_discard(folder, UnpublishedError("complete"), None)
    assert folder.is_dir()
    keep_or_discard(folder, ValueError(), None)
    assert not folder.exists() and capsys.readouterr().err == ""


def test_a_staged_folder_appears_complete_or_not_at_all(tmp_path):
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


def test_a_finished_staged_folder_is_kept_if_the_path_is_taken(tmp_path):
    with pytest.raises(UnpublishedError), staged_folder(tmp_path / "out") as stage:
        (stage / "data").mkdir()
        (tmp_path / "out").write_text("mine")
    assert names(tmp_path) == [".out.demo", "out"] and names(stage) == ["data"]


def test_only_the_files_of_a_killed_run_are_cleared(tmp_path):
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
