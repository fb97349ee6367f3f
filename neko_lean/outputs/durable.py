"""Files and folders that survive a crash and lead nowhere else: fsync, atomic writes, and no links."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from neko_lean.errors import NekoLeanError


def sync(path: Path) -> None:
    """fsync one file or folder, so that a rename that follows is not seen before the bytes are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file in a folder, and the folder and those in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that it is either absent, as it was, or whole, whoever writes to it at the same time.

    Args:
        path: file to create or replace; a link there is replaced, not followed.
        data: its bytes, or its text, which is written as UTF-8.
    """
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # of a process with this number that was killed
    try:
        with temporary.open("xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def temporary_name(path: Path) -> Path:
    """The name that this process, and no other, gives to `path` while it writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporaries(path: Path) -> None:
    """Remove what processes that were killed left of writes to `path`. Needs the lock of whoever writes it."""
    made = re.compile(re.escape(f".{path.name}.") + r"\d+\.tmp")
    for other in path.parent.iterdir():
        if made.fullmatch(other.name):
            other.unlink()


def no_follow(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses to follow a link at `path`."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_in_place(path: Path, data: bytes) -> None:
    """Make `data` the content of a file that others of this process append to. Refuses to follow a link."""
    with open(path, "wb", opener=no_follow) as file:
        file.write(data)


def unshare(path: Path) -> None:
    """Give a file that is written to in place a copy of its own when it has another name elsewhere (a hard link)."""
    if path.exists() and path.stat(follow_symlinks=False).st_nlink > 1:
        write_atomically(path, path.read_bytes())


def refuse_links(folder: Path) -> None:
    """Raise NekoLeanError unless `folder` is a folder that holds only folders and ordinary files, at every depth.

    neko-lean makes no links in the folders it works in. Through one, files elsewhere would be read, emptied or
    overwritten.
    """
    if not folder.is_symlink() and not folder.exists():
        return
    for path in (folder, *_below(folder)):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise NekoLeanError(f"{path} is a link, and neko-lean follows none in the folders it works in: remove it.")
        wanted = stat.S_ISDIR(mode) if path == folder else stat.S_ISDIR(mode) or stat.S_ISREG(mode)
        if not wanted:
            raise NekoLeanError(f"{path} is not {'a folder' if path == folder else 'an ordinary file'}: remove it.")


def _below(folder: Path) -> list[Path]:
    """Everything in a folder, without following links. Raises OSError where part of it cannot be read."""
    if folder.is_symlink() or not folder.is_dir():
        return []

    def fail(error: OSError) -> None:
        raise error

    return [
        Path(parent, name) for parent, folders, files in os.walk(folder, onerror=fail) for name in (*folders, *files)
    ]


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours and what is in it, but never what a link leads to. Raises OSError."""
    if folder.is_dir() and not folder.is_symlink():
        empty_folder(folder)
        folder.rmdir()


def empty_folder(folder: Path, keep: Callable[[str], bool] = lambda name: False) -> None:
    """Remove what is in a folder of ours, except the names that `keep` spares. Links are removed, not followed."""
    for path in sorted(folder.iterdir()):
        if keep(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
