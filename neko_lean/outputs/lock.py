"""Advisory locks: one process at a time writes an output.

A run locks the file `.NAME.lock` next to its output. The system releases the lock when the process ends. Under
torchrun only the main process holds it. The other ranks lock the work folder, so that they are noticed if they outlive
the main process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from neko_lean.distributed import is_main_process
from neko_lean.errors import NekoLeanError
from neko_lean.outputs.place import Output
from neko_lean.outputs.write_errors import explained_write_errors
from neko_lean.terminal import log_line

_MAX_TRIES = 100  # another process may remove the lock file between our open and our lock, but hardly this often


@contextmanager
def locked(output: Output) -> Iterator[None]:
    """Hold the lock of an output while the block runs.

    Missing folders above the output are created, and removed again if the block leaves nothing in them. The lock file
    stays empty and is removed at the end.

    Raises:
        NekoLeanError: if another process holds the lock, or if the lock file is a link or is not a lock file.
    """
    folder = output.path.parent
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with explained_write_errors(output.path):
        descriptor = _acquire(output)
    try:
        yield
    finally:
        # Remove the file before releasing the lock: a process that has opened it sees that it no longer has a name.
        with suppress(OSError):
            output.lock.unlink()
        os.close(descriptor)
        with suppress(OSError):  # stops at the first folder that is not empty
            for path in missing:
                path.rmdir()


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Mark a work folder as in use by this rank while the block runs. Does nothing on the main process.

    A later run on the same output then notices this rank even if the main process has died and its lock is gone.
    """
    if is_main_process():
        yield
        return
    with _opened(folder) as descriptor:
        with suppress(OSError):  # file system without locks; `locked` has warned about it
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def refuse_orphans(folder: Path) -> None:
    """Raise NekoLeanError if a rank of an earlier run still works in a folder. Requires the lock of its output."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with _opened(folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NekoLeanError(
                f"a process of an earlier run still writes to {folder}: wait for it or end it, or choose another --out."
            ) from error
        except OSError:  # file system without locks
            pass


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Open a folder, which must not be a link, and yield its descriptor."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(output: Output) -> int:
    """Lock the output's lock file and return its descriptor."""
    for _ in range(_MAX_TRIES):
        output.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open_lock_file(output.lock)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            _lock(descriptor, output)
            if _is_named(descriptor, output.lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise NekoLeanError(f"another process is writing {output.path}: wait for it, or choose another --out.")


def _open_lock_file(path: Path) -> int:
    """Open or create a lock file without following a link."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise NekoLeanError(f"{path} is a link, but a lock file must not be one: remove it.") from error
        raise

    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        os.close(descriptor)
        raise NekoLeanError(f"{path} is not a lock that neko-lean made: move it away, or choose another --out.")
    return descriptor


def _lock(descriptor: int, output: Output) -> None:
    """Lock an open lock file, or warn if its file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise NekoLeanError(
            f"another process is writing {output.path}: wait for it, or choose another --out."
        ) from error
    except OSError as error:
        log_line(
            f"warning: two commands on {output.path} at the same time would not notice each other, because its file "
            f"system has no locks ({os.strerror(error.errno or 0)})."
        )


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the name of the open file."""
    try:
        named, opened = path.stat(follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
