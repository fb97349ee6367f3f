"""Recognise a run that is finished already, so that `--resume` has nothing left to train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neko_lean.checkpoints.run_folder import COMPLETE, RunFolder
from neko_lean.checkpoints.run_identity import differences, digests
from neko_lean.checkpoints.saves import Save, read_save
from neko_lean.distributed import run_on_main_and_broadcast
from neko_lean.jsonio import json_object
from neko_lean.outputs import (
    RUN,
    Output,
    discard,
    explained_write_errors,
    locked,
    publish,
    refuse_strange_work,
    remove_replaced,
    restore_interrupted,
)


def finished_run(output: Output, identity: Mapping[str, Any], *, dry_run: bool = False) -> dict[str, Any] | None:
    """Find the finished output of exactly this run.

    The output may be in its place, or complete in the work folder, from where it is moved to its place. What the run
    left in its work folder is removed; what another run left there stays.

    Args:
        output: a claimed output.
        identity: inputs that determine the run's final weights.
        dry_run: move and remove nothing.

    Returns the content of run.json, or None if the run is not finished.

    Raises NekoLeanError if another process is writing the output, or if it cannot be moved.
    """
    return run_on_main_and_broadcast(lambda: _finish(output, identity, dry_run))


def _finish(output: Output, identity: Mapping[str, Any], dry_run: bool) -> dict[str, Any] | None:
    """`finished_run` on the main process."""
    complete = output.work / COMPLETE
    found = _read_run_of(output.path, identity) or _read_run_of(complete, identity)
    if found is None or dry_run:
        return found

    with locked(output), explained_write_errors(output.path):
        restore_interrupted(output)

        # Move a complete output to its place.
        if _read_run_of(output.path, identity) is None:
            if _read_run_of(complete, identity) is None:
                return None  # another process changed it before it was locked
            refuse_strange_work(output)
            publish(complete, output)

        # Remove the work folder, which nothing needs any more, unless it belongs to another run.
        saves = [read_save(folder) for folder in RunFolder(output, {}).saves()]
        if not any(isinstance(save, Save) and differences(save.identity, identity) for save in saves):
            refuse_strange_work(output)
            discard(output.work)

        remove_replaced(output)
        return _read_run_of(output.path, identity)


def _read_run_of(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of run.json if `folder` is the complete output of the run with this identity."""
    content = read_run_json(folder)
    return content if content is not None and content.get("made_from") == digests(identity) else None


def read_run_json(folder: Path) -> dict[str, Any] | None:
    """The content of run.json in `folder`, or None if it cannot be read."""
    try:
        return json_object(folder / RUN)
    except OSError:
        return None
