"""The last step of a run: its finished folder takes its place, or stays where it is and is named."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from neko_lean.errors import NekoLeanError, UnpublishedError
from neko_lean.outputs.durable import refuse_links, remove_temporaries, remove_tree, sync, write_atomically
from neko_lean.outputs.lock import locked, refuse_orphans
from neko_lean.outputs.ownership import why_not_our_work, why_not_ours
from neko_lean.outputs.place import (
    Output,
    Source,
    claim_folder,
    refuse_occupied,
    refuse_occupied_file,
    restore_interrupted,
)
from neko_lean.outputs.write_errors import explained_write_errors, os_error_sentence
from neko_lean.terminal import log_line


def publish(stage: Path, output: Output) -> None:
    """Move the complete folder `stage` to the output's place. Needs the output's lock.

    What appeared there while the run worked is left alone unless the output may be replaced. An old output moves aside
    first and is removed last, so that a crash leaves both.

    Raises UnpublishedError, with `stage` untouched, when the place is taken or the move fails.
    """
    try:
        refuse_occupied(output)
        _move(stage, output)
    except (OSError, NekoLeanError) as error:
        raise UnpublishedError(_left_behind(stage, output.path, error)) from error


def publish_file(data: bytes | str, output: Output, option: str) -> None:
    """Write a claimed file, unless one that may not be replaced has appeared there. Raises NekoLeanError."""
    with explained_write_errors(output.path), locked(output):
        refuse_occupied_file(output, option)
        remove_temporaries(output.path)
        write_atomically(output.path, data)


def remove_replaced(output: Output) -> None:
    """Remove the output that a run had replaced before it was killed. Needs the lock, and a complete output."""
    restore_interrupted(output)
    if output.old.exists():
        _discard(output.old)


@contextmanager
def staged_folder(
    out: Source, kind: str = "demo", inputs: Iterable[Source | None] = (), *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty folder next to `out` that becomes `out` when the block ends well and vanishes when it fails.

    What a run of the same kind left there when it was killed is cleared away first. Raises NekoLeanError as
    claim_folder and publish do, and UnpublishedError when the folder is complete but cannot be moved.
    """
    output = claim_folder(out, kind, inputs, overwrite=overwrite)
    with locked(output), explained_write_errors(output.path):
        restore_interrupted(output)
        refuse_occupied(output)
        clear_work(output)
        output.work.mkdir()
        try:
            yield output.work
            publish(output.work, output)
        except UnpublishedError:
            raise
        except BaseException:
            _discard(output.work)
            raise


def clear_work(output: Output) -> None:
    """Remove the work folder that a run left behind. Raises NekoLeanError where it holds something that is not ours."""
    refuse_strange_work(output)
    remove_tree(output.work)


def refuse_strange_work(output: Output) -> None:
    """Raise NekoLeanError where the work folder holds links, or something that no run of its kind writes, or where a
    rank of an earlier run still writes to it. Needs the output's lock."""
    refuse_links(output.work)
    refuse_orphans(output.work)
    if output.work.is_dir():
        reason = why_not_our_work(output.work, output.kind)
        if reason is not None:
            raise NekoLeanError(f"{output.work} {reason}: move it away, or choose another --out.")


def refuse_unfinished(output: Output, resume: bool) -> None:
    """Raise NekoLeanError where an unfinished run is in the way that is neither to be continued nor replaced."""
    if output.work.exists() and not resume and not output.overwrite:
        raise NekoLeanError(
            f"{output.work} holds an unfinished run: continue with --resume, or start anew with --overwrite."
        )


def refuse_unplanned(work: Path, plan: str) -> None:
    """Raise NekoLeanError where a work folder without the file `plan` holds what a run, perhaps of another command, has
    made. Temporary files count for nothing."""
    made = sorted(path.name for path in work.iterdir() if not path.name.startswith("."))
    if made:
        raise NekoLeanError(f"{work} holds {made[0]} but no {plan} that says what of: start anew with --overwrite.")


def _discard(folder: Path) -> None:
    """Remove a work folder after an error, without hiding that error."""
    try:
        remove_tree(folder)
    except OSError as error:
        log_line(f"warning: {folder} stays behind: {os_error_sentence(error)}")


def _move(stage: Path, output: Output) -> None:
    out, old = output.path, output.old
    replaced = out.is_dir() and any(out.iterdir())
    if replaced:
        if old.exists():  # of a process that was killed after its own result had taken its place
            restore_interrupted(output)
            remove_tree(old)
        out.rename(old)
    try:
        if replaced and (reason := why_not_ours(old)) is not None:
            raise NekoLeanError(f"{out} {reason}")  # written to since it was looked at
        stage.rename(out)
    except BaseException:
        if replaced and not os.path.lexists(out):
            old.rename(out)
        raise
    sync(out.parent)
    if replaced:
        _discard(old)


def _left_behind(stage: Path, out: Path, error: Exception) -> str:
    """What to do with a finished folder that could not be moved."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
    return (
        f"the result is complete, but could not be moved to {out} ({reason}): it is in {stage}; move it with "
        f"mv {shlex.quote(str(stage))} PLACE."
    )
