"""One process at a time: also when the lock's file is removed, linked, or somebody's own."""

import errno
import fcntl
import multiprocessing
import os
import time

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.outputs.lock import locked, working_in
from neko_lean.outputs.place import claim_folder
from neko_lean.outputs.publish import clear_work


@pytest.fixture
def output(tmp_path):
    return claim_folder(tmp_path / "deep" / "out", "partial", [])


def test_the_lock_is_exclusive_and_leaves_nothing(output):
    with (
        locked(output),
        pytest.raises(NekoLeanError, match=r"another process is writing .*out: wait for it, or choose another --out"),
        locked(output),
    ):
        pass
    with pytest.raises(ZeroDivisionError), locked(output):
        assert [path.name for path in output.path.parent.iterdir()] == [".out.lock"]
        raise ZeroDivisionError
    # The folder above was made for it, and nothing was left there.
    assert not output.path.parent.exists() and output.path.parents[1].is_dir()
    with locked(output):
        output.path.mkdir()
    assert [path.name for path in output.path.parent.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_taken_over(output):
    output.path.parent.mkdir()
    output.lock.touch()
    with locked(output):
        assert output.lock.is_file()
    assert not output.lock.exists()


def test_a_lock_that_is_not_ours_is_left_alone(output, tmp_path):
    output.path.parent.mkdir()
    (tmp_path / "theirs").write_text("all of it")
    for make, words in (
        (lambda: output.lock.symlink_to(tmp_path / "theirs"), "is a link"),
        (lambda: output.lock.symlink_to(tmp_path / "nowhere"), "is a link"),
        (lambda: os.link(tmp_path / "theirs", output.lock), "not a lock that neko-lean made"),
        (lambda: os.mkfifo(output.lock), "not a lock that neko-lean made"),
        (output.lock.mkdir, "lock"),
    ):
        make()
        with pytest.raises(NekoLeanError, match=words), locked(output):
            pass
        assert os.path.lexists(output.lock) and (tmp_path / "theirs").read_text() == "all of it"
        output.lock.rmdir() if output.lock.is_dir() else output.lock.unlink()
    assert not (tmp_path / "nowhere").exists()


def test_a_file_system_without_locks_is_warned_about(output, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(output):
        pass
    assert capsys.readouterr().err.startswith("warning: two commands on ")


def test_a_rank_that_outlives_its_run_keeps_others_out_of_the_work_folder(output, monkeypatch):
    """The first rank is killed, and its lock is gone; another one still writes to the work folder."""
    output.work.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("neko_lean.outputs.lock.is_main_process", lambda: False)
        orphan = working_in(output.work)
        orphan.__enter__()
        other = working_in(output.work)  # ranks do not keep each other out
        with other:
            pass
    with locked(output), pytest.raises(NekoLeanError, match="a process of an earlier run still writes to"):
        clear_work(output)
    assert output.work.is_dir()
    orphan.__exit__(None, None, None)
    with locked(output):
        clear_work(output)
    assert not output.work.exists()


def take_turns(out, counter, rounds):
    """Count in a file that only the holder of the lock may touch."""
    done = 0
    while done < rounds:
        try:
            with locked(claim_folder(out, "partial", [])):  # either may find that another has just removed the folder
                value = int(counter.read_text())
                time.sleep(0)
                counter.write_text(str(value + 1))
                done += 1
        except NekoLeanError:
            pass


def test_processes_that_compete_never_hold_it_together(tmp_path):
    """Each removes the file at the end, while others have it open."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=take_turns, args=(tmp_path / "deep" / "out", counter, 200)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0, 0] and counter.read_text() == "600"
    # The folder above may stay: who made it was not the last to need it.
    assert not any((tmp_path / "deep").glob("*"))
