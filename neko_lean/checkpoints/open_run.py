"""Open the work folder of a run: lock it, compare it with the run, and keep or remove it at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from neko_lean.checkpoints.finished import read_run_json
from neko_lean.checkpoints.run_folder import COMPLETE, DAMAGED, RunFolder
from neko_lean.checkpoints.run_identity import digests, versions
from neko_lean.distributed import is_main_process, run_on_main_and_broadcast
from neko_lean.errors import Interrupted, NekoLeanError, UnpublishedError
from neko_lean.outputs import (
    Output,
    discard,
    empty_folder,
    explained_write_errors,
    open_work_folder,
    refuse_occupied,
    refuse_strange_work,
    sync,
)
from neko_lean.terminal import log_line


@contextmanager
def open_run_folder(
    output: Output, identity: dict[str, Any], *, save_every: int = 0, resume: bool = False
) -> Iterator[RunFolder]:
    """Open the work folder of the run that writes `output`.

    The folder is that of the interrupted run if `resume` is set, and otherwise empty. It is removed at the end, unless
    an error or a signal leaves something to continue from, or the finished output could not be moved to its place.

    Args:
        output: a claimed output.
        identity: inputs that determine the run's final weights.
        save_every: steps between saves; 0 saves only when a signal stops the run.
        resume: whether to continue an interrupted run.

    Raises NekoLeanError if the output may not be replaced, an unfinished run is in the way, another process is writing
    the same output, or the folder cannot be written to.
    """
    run = RunFolder(output, identity, save_every, resume)
    opened = False

    def on_error(error: BaseException) -> None:
        if opened:
            _keep_or_discard(run, error)

    with open_work_folder(output, lambda: _prepare(run), on_error):
        # Compare the saves with this run before anything is removed.
        run.resume_from = run.latest_save() if resume else None
        run_on_main_and_broadcast(lambda: _remove_leftovers(run))
        if run.resume_from is not None and run.resume_from.versions != versions():
            log_line(
                "warning: the final weights may differ in their last bits, because the run was started with other "
                "package versions."
            )

        opened = True
        yield run

        if is_main_process():
            discard(run.folder)


def check_run_folder(output: Output, identity: dict[str, Any], *, resume: bool = False) -> None:
    """Refuse what `open_run_folder` refuses, without the lock and without any change, for a dry run.

    The arguments are those of `open_run_folder`.
    """
    run = RunFolder(output, identity, 0, resume)
    _refuse_in_the_way(run)
    if resume:
        run.refuse_other_saves()


def _refuse_in_the_way(run: RunFolder) -> None:
    refuse_occupied(run.output)
    refuse_strange_work(run.output)
    if run.resume:
        _refuse_other_complete_run(run)
    elif not run.output.overwrite and (progress := run.describe_progress()):
        raise NekoLeanError(f"{progress}: continue with --resume, or start anew with --overwrite.")


def _prepare(run: RunFolder) -> bool:
    """Refuse what is in the way, and create the work folder. Requires the output's lock."""
    _refuse_in_the_way(run)
    run.folder.mkdir(exist_ok=True)
    sync(run.folder.parent)
    return True


def _refuse_other_complete_run(run: RunFolder) -> None:
    """Raise NekoLeanError if the work folder holds the complete output of another run, which would be lost."""
    content = read_run_json(run.folder / COMPLETE)
    old, new = (content or {}).get("made_from"), digests(run.identity)
    if not isinstance(old, dict):
        return
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if changed:
        raise NekoLeanError(
            f"{run.folder} keeps a finished run with another {', '.join(changed)}; give the original values again, or "
            f"start anew with --overwrite."
        )


def _remove_leftovers(run: RunFolder) -> None:
    """Remove what the run cannot continue from; without `resume` that is everything."""

    def keep(name: str) -> bool:
        return run.resume and name.startswith(("step-", "best-", DAMAGED, "cache", ".cache."))

    with explained_write_errors(run.output.path):
        empty_folder(run.folder, keep)
    run.remove_old_weights(run.resume_from.state.best_step if run.resume_from else 0)


def _keep_or_discard(run: RunFolder, error: BaseException) -> None:
    """After an error, keep the folder if there is something to continue from and add that to the error."""
    progress = run.describe_progress()
    if isinstance(error, UnpublishedError):
        error.args = (f"{error} Or fix that and run the same command again with --resume.",)
    elif progress is None:
        if not any(run.folder.glob(f"{DAMAGED}*")):
            discard(run.folder)
    elif isinstance(error, Interrupted):
        error.saved_state = progress
    elif isinstance(error, NekoLeanError):
        error.args = (f"{error} {progress}: continue with --resume.",)
    else:
        log_line(f"{progress}: continue with --resume.")
