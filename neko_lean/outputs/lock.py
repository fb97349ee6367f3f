"""One process at a time writes an output: an advisory lock on `.NAME.lock`, which the system drops with the process."""

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

_TRIES = 100  # another process can remove the file between our open and our lock this often in a row


@contextmanager
def locked(output: Output) -> Iterator[None]:
    """Hold the lock of an output while the block runs.

    The file stays empty, so that nothing can be lost by it, and is removed with the lock. Folders above the output that
    are missing are made, and removed again if the block leaves nothing in them.

    Raises NekoLeanError when another process holds it, or when the file is a link or somebody's own.
    """
    folder = output.path.parent
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with explained_write_errors(output.path):
        descriptor = _acquire(output)
    try:
        yield
    finally:
        # Removed while it is held: a process that opened it meanwhile sees that its file has no name any more.
        with suppress(OSError):
            output.lock.unlink()
        os.close(descriptor)
        with suppress(OSError):  # the first that holds something ends it
            for path in missing:
                path.rmdir()


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """While it lasts, a later run on the same output finds that this process, a rank that is not the first, writes to
    the work folder, also when the first rank has died and its lock with it. For the first rank it does nothing."""
    if is_main_process():
        yield
        return
    with _opened(folder) as descriptor:
        with suppress(OSError):  # without locks, as `locked` warns
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def refuse_orphans(folder: Path) -> None:
    """Raise NekoLeanError where a rank of an earlier run still works in a folder whose output's lock we hold."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with _opened(folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NekoLeanError(
                f"a process of an earlier run still writes to {folder}: wait for it or end it, or choose another --out."
            ) from error
        except OSError:  # without locks
            pass


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The descriptor of a folder, which is no link, while the block runs."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(output: Output) -> int:
    """The descriptor of the locked file."""
    for _ in range(_TRIES):
        output.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open(output.lock)
        except FileNotFoundError:  # another process has removed the folder again
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


def _open(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise NekoLeanError(f"{path} is a link, and the lock of an output must not be one: remove it.") from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        os.close(descriptor)
        raise NekoLeanError(f"{path} is not a lock that neko-lean made: move it away, or choose another --out.")
    return descriptor


def _lock(descriptor: int, output: Output) -> None:
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
    """Whether `path` still names the file that was opened."""
    try:
        named, opened = path.stat(follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
