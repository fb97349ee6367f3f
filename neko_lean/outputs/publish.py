"""The last step of a run: move its finished folder to the output's path."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from neko_lean.errors import NekoLeanError, UnpublishedError
from neko_lean.outputs.durable import remove_temporaries, remove_tree, sync, write_atomically
from neko_lean.outputs.lock import locked
from neko_lean.outputs.ownership import why_not_ours
from neko_lean.outputs.place import Output, refuse_occupied, refuse_occupied_file, restore_interrupted
from neko_lean.outputs.write_errors import explained_write_errors, os_error_sentence
from neko_lean.terminal import log_line


def publish(folder: Path, output: Output) -> None:
    """Move a complete folder to the output's path. Requires the output's lock.

    An output that may be replaced is moved aside first and removed last, so that a crash loses neither of the two.
    Anything else that has appeared at the output's path is left alone.

    Args:
        folder: the complete result, on the same file system as the output.
        output: where to move it.

    Raises:
        UnpublishedError: if the output's path is taken or the move fails. `folder` is unchanged.
    """
    try:
        refuse_occupied(output)
        _move(folder, output)
    except (OSError, NekoLeanError) as error:
        raise UnpublishedError(_unpublished_message(folder, output.path, error)) from error


def publish_file(data: bytes | str, output: Output, option: str) -> None:
    """Write a claimed file. Raises NekoLeanError if a file that may not be replaced has appeared there meanwhile."""
    with explained_write_errors(output.path), locked(output):
        refuse_occupied_file(output, option)
        remove_temporaries(output.path)
        write_atomically(output.path, data)


def remove_replaced(output: Output) -> None:
    """Remove the old output of a run that was killed after replacing it. Requires the lock and a complete output."""
    restore_interrupted(output)
    if output.old.exists():
        discard(output.old)


def discard(folder: Path) -> None:
    """Remove a folder that is no longer needed. A failure is logged, not raised."""
    try:
        remove_tree(folder)
    except OSError as error:
        log_line(f"warning: {folder} was not removed: {os_error_sentence(error)}")


def _move(folder: Path, output: Output) -> None:
    """Rename `folder` to the output's path, and move an output that is there out of the way."""
    replaces = output.path.is_dir() and any(output.path.iterdir())
    if replaces:
        if output.old.exists():  # left by a process that was killed after its own result was in place
            restore_interrupted(output)
            remove_tree(output.old)
        output.path.rename(output.old)

    try:
        # Check again: something may have been added to the old output just before it was renamed.
        if replaces and (reason := why_not_ours(output.old)) is not None:
            raise NekoLeanError(f"{output.path} {reason}")
        folder.rename(output.path)
    except BaseException:
        if replaces and not os.path.lexists(output.path):
            output.old.rename(output.path)
        raise

    sync(output.path.parent)
    if replaces:
        discard(output.old)


def _unpublished_message(folder: Path, out: Path, error: Exception) -> str:
    """Say why a finished folder could not be moved, where it is, and how to move it."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
    return (
        f"the result is complete, but could not be moved to {out} ({reason}): it is in {folder}; move it with "
        f"mv {shlex.quote(str(folder))} PLACE."
    )
