"""Durable writes and deletions that never follow a link.

A link in a work folder could make neko-lean read, empty or overwrite files elsewhere. neko-lean itself never creates
links there.
"""

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
    """fsync a file or folder, so that its content is on disk before a rename that follows."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync a folder and everything in it, at every depth."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Create or replace a file. After a crash the file has its old content, or all of the new one.

    Args:
        path: file to write. A link at this path is replaced, not followed.
        data: content of the file. Text is encoded as UTF-8.

    Raises:
        OSError: if the file cannot be written. The old file is unchanged.
    """
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # left by a killed process that had this process's number
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
    """The name under which this process writes `path` before renaming it. No other process uses it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporaries(path: Path) -> None:
    """Remove the temporary files of killed processes that were writing `path`. Requires the lock of `path`."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"\d+\.tmp")
    for sibling in path.parent.iterdir():
        if pattern.fullmatch(sibling.name):
            sibling.unlink()


def no_follow(path: str, flags: int) -> int:
    """An `opener` for `open` that raises OSError if `path` is a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_in_place(path: Path, data: bytes) -> None:
    """Overwrite a file that this process also has open for appending. Raises OSError if `path` is a link."""
    with open(path, "wb", opener=no_follow) as file:
        file.write(data)


def unshare(path: Path) -> None:
    """Replace a file that has several hard links by a copy, so that writing to it in place changes no other file."""
    if path.exists() and path.stat(follow_symlinks=False).st_nlink > 1:
        write_atomically(path, path.read_bytes())


def refuse_links(folder: Path) -> None:
    """Check that a folder contains only folders and ordinary files, at every depth.

    Raises:
        NekoLeanError: if `folder` is a link or a file, or contains a link or a special file. A missing folder is fine.
    """
    if not folder.is_symlink() and not folder.exists():
        return
    for path in (folder, *_contents(folder)):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise NekoLeanError(f"{path} is a link, and neko-lean follows no links in its work folders: remove it.")
        if path == folder and not stat.S_ISDIR(mode):
            raise NekoLeanError(f"{path} is not a folder: remove it.")
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise NekoLeanError(f"{path} is not an ordinary file: remove it.")


def _contents(folder: Path) -> list[Path]:
    """All files and folders in a folder, without following links. Raises OSError if part of it cannot be read."""
    if folder.is_symlink() or not folder.is_dir():
        return []

    def fail(error: OSError) -> None:
        raise error

    return [
        Path(parent, name) for parent, folders, files in os.walk(folder, onerror=fail) for name in (*folders, *files)
    ]


def remove_tree(folder: Path) -> None:
    """Remove a folder and its content. Links are removed, not followed; a link at `folder` itself is left alone."""
    if folder.is_dir() and not folder.is_symlink():
        empty_folder(folder)
        folder.rmdir()


def empty_folder(folder: Path, keep: Callable[[str], bool] = lambda name: False) -> None:
    """Remove the content of a folder, except the names for which `keep` is true. Links are removed, not followed."""
    for path in sorted(folder.iterdir()):
        if keep(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
