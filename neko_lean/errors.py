"""The one error that users see: a sentence that names the thing and the fix, exit code 2, no traceback."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NekoLeanError(Exception):
    """Something the user can mend. Its text is one sentence and is all that the command line prints."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` when the block ends well and vanishes when it fails.

    So an output folder is either absent (or as it was) or complete, never half-written. Raises NekoLeanError when
    `out` already holds something and `overwrite` is off, when the disk is full, or when it cannot be written to.
    """
    out = Path(out).absolute()
    refuse_occupied(out, overwrite)
    stage = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        with explained_write_errors(out):
            stage.mkdir(parents=True)
            yield stage
            publish(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raise NekoLeanError when `out` is a file, or a folder that holds something and may not be replaced."""
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise NekoLeanError(f"{out} already holds something: choose another --out, or pass --overwrite.")
    if out.exists() and not out.is_dir():
        raise NekoLeanError(f"{out} is a file, not a folder: choose another --out.")


def refuse_unfinished(stage: Path, resume: bool, overwrite: bool) -> None:
    """Raise NekoLeanError when `stage` holds an unfinished run that is neither gone on with nor replaced; clear away
    one that is replaced."""
    if stage.exists() and not resume:
        if not overwrite:
            raise NekoLeanError(
                f"{stage} holds an unfinished run: go on with --resume, or start anew with --overwrite."
            )
        shutil.rmtree(stage)


def publish(stage: Path, out: Path) -> None:
    """Move a complete folder to its place; an old one there makes way first and is removed last."""
    old = out.parent / f".{out.name}.old"
    if out.exists():
        # The old folder moves aside before the new one arrives, so a crash between leaves both on disk.
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    stage.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync one file or folder, so that a rename that follows is not seen before the bytes are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file in a folder, and the folder and those in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def explained_write_errors(where: Path) -> Iterator[None]:
    """Turn 'disk full', 'read-only' and their like into one sentence that names `where`."""
    try:
        yield
    except NekoLeanError:
        raise
    except Exception as error:
        # safetensors wraps the operating system's error in its own type and keeps only the text.
        text = str(error)
        code = getattr(error, "errno", None)
        if code == errno.ENOSPC or "No space left" in text or "os error 28" in text:
            raise NekoLeanError(f"No space left on the disk while writing {where}: free some and run again.") from error
        if code in (errno.EROFS, errno.EACCES, errno.EPERM) and isinstance(error, OSError):
            raise NekoLeanError(f"{where} cannot be written to ({error.strerror}): choose another --out.") from error
        raise
