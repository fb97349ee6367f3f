"""Locks: one process at a time, also if the lock file is removed, is a link, or belongs to somebody else."""

import errno
import fcntl
import multiprocessing
import os
import time

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.outputs.lock import locked, working_in
from neko_lean.outputs.place import claim_folder
from neko_lean.outputs.work_folder import clear_work


@pytest.fixture
def output(tmp_path):
    return claim_folder(tmp_path / "deep" / "out", "partial", [])


def test_the_lock_is_exclusive_and_leaves_no_files(output):
    with (
        locked(output),
        pytest.raises(NekoLeanError, match=r"another process is writing .*out: wait for it, or choose another --out"),
        locked(output),
    ):
        pass
    with pytest.raises(ZeroDivisionError), locked(output):
        assert [path.name for path in output.path.parent.iterdir()] == [".out.lock"]
        raise ZeroDivisionError
    # The folder above was created for the lock, and is removed with it.
    assert not output.path.parent.exists() and output.path.parents[1].is_dir()
    with locked(output):
        output.path.mkdir()
    assert [path.name for path in output.path.parent.iterdir()] == ["out"]


def test_the_lock_file_of_a_killed_process_is_taken_over(output):
    output.path.parent.mkdir()
    output.lock.touch()
    with locked(output):
        assert output.lock.is_file()
    assert not output.lock.exists()


def test_a_file_that_is_not_a_lock_is_left_alone(output, tmp_path):
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


def test_a_file_system_without_locks_causes_a_warning(output, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(output):
        pass
    assert capsys.readouterr().err.startswith("warning: two commands on ")


def test_a_rank_that_outlives_its_main_process_blocks_the_work_folder(output, monkeypatch):
    """The main process was killed and its lock is gone, but another rank still writes to the work folder."""
    output.work.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("neko_lean.outputs.lock.is_main_process", lambda: False)
        orphan = working_in(output.work)
        orphan.__enter__()
        with working_in(output.work):  # ranks do not block each other
            pass
    with locked(output), pytest.raises(NekoLeanError, match="a process of an earlier run still writes to"):
        clear_work(output)
    assert output.work.is_dir()
    orphan.__exit__(None, None, None)
    with locked(output):
        clear_work(output)
    assert not output.work.exists()


def count_under_lock(out, counter, rounds):
    """Increment the number in a file `rounds` times, each time under the lock."""
    done = 0
    while done < rounds:
        try:
            # Both calls fail if another process has just removed the folder.
            with locked(claim_folder(out, "partial", [])):
                value = int(counter.read_text())
                time.sleep(0)
                counter.write_text(str(value + 1))
                done += 1
        except NekoLeanError:
            pass


def test_competing_processes_never_hold_the_lock_at_the_same_time(tmp_path):
    """Each process removes the lock file at the end, while others have it open."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    fork = multiprocessing.get_context("fork")
    arguments = (tmp_path / "deep" / "out", counter, 200)
    processes = [fork.Process(target=count_under_lock, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and counter.read_text() == "600"
    # The folder above may remain, because the process that created it was not the last one to use it.
    assert not any((tmp_path / "deep").glob("*"))
