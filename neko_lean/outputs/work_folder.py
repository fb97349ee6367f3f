"""The work folder of a run: created or resumed under the output's lock, kept or removed when the run fails.

A run writes to a hidden folder next to its output, and the complete result is moved to the output's path as a whole. So
an output is either absent or complete, and a killed run can continue from its work folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from neko_lean.distributed import is_main_process, require_shared_folder, run_on_main_and_broadcast
from neko_lean.errors import NekoLeanError, UnpublishedError
from neko_lean.outputs.durable import refuse_links, remove_tree
from neko_lean.outputs.lock import locked, refuse_orphans, working_in
from neko_lean.outputs.ownership import why_not_our_work
from neko_lean.outputs.place import Output, Source, claim_folder, refuse_occupied, restore_interrupted
from neko_lean.outputs.publish import discard, publish
from neko_lean.outputs.write_errors import explained_write_errors
from neko_lean.terminal import log_line


@contextmanager
def open_work_folder(
    output: Output, prepare: Callable[[], bool], on_error: Callable[[BaseException], None]
) -> Iterator[bool]:
    """Hold the lock of an output, and its work folder, while the block runs.

    All ranks must enter it. The main process locks the output, restores an output that an interrupted run had moved
    aside, and calls `prepare`. Then every rank marks the work folder as in use. The block publishes the result itself.

    Args:
        output: the claimed output.
        prepare: called under the lock, on the main process only. It refuses what is in the way, and creates
            `output.work` or checks that it belongs to the same run. Returns whether there is work to do; if not, the
            work folder need not exist.
        on_error: called on the main process, still under the lock, with the exception that ended the block. It decides
            whether the work folder is kept; see `keep_or_discard`.

    Yields:
        The result of `prepare`, on all ranks.

    Raises:
        NekoLeanError: if another process is writing the output, if `prepare` refuses, or if a rank does not see the
            work folder.
    """
    with ExitStack() as stack:

        def lock_and_prepare() -> bool:
            stack.enter_context(locked(output))
            with explained_write_errors(output.path):
                restore_interrupted(output)
                return prepare()

        has_work = run_on_main_and_broadcast(lock_and_prepare)
        if not has_work:
            yield False
            return

        require_shared_folder(output.work)
        stack.enter_context(working_in(output.work))
        try:
            yield True
        except BaseException as error:
            if is_main_process():
                on_error(error)
            raise


def keep_or_discard(folder: Path, error: BaseException, content: str | None, quiet: bool = False) -> None:
    """After an error, keep a work folder from which a later run can resume, and remove any other.

    Args:
        folder: the work folder.
        error: the exception that ended the run. After an UnpublishedError, which names the folder itself, the folder is
            kept without a message.
        content: what the folder contains that is worth resuming from, such as 'the shards that are complete', or None.
        quiet: do not log that the folder is kept.
    """
    if isinstance(error, UnpublishedError):
        return
    if content is None:
        discard(folder)
    else:
        log_line(f"{folder} keeps {content}: continue with --resume.", quiet)


@contextmanager
def staged_folder(
    out: Source, kind: str = "demo", inputs: Iterable[Source | None] = (), *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends, and is removed if the block fails.

    A folder that a killed run of the same kind has left is removed first.

    Args:
        out, kind, inputs, overwrite: as for claim_folder.

    Raises:
        NekoLeanError: as claim_folder does.
        UnpublishedError: if the folder is complete but cannot be moved to `out`.
    """
    output = claim_folder(out, kind, inputs, overwrite=overwrite)

    def prepare() -> bool:
        refuse_occupied(output)
        clear_work(output)
        output.work.mkdir()
        return True

    def on_error(error: BaseException) -> None:
        keep_or_discard(output.work, error, None)

    with open_work_folder(output, prepare, on_error), explained_write_errors(output.path):
        yield output.work
        publish(output.work, output)


def clear_work(output: Output) -> None:
    """Remove the work folder of an earlier run. Raises NekoLeanError as `refuse_strange_work` does."""
    refuse_strange_work(output)
    remove_tree(output.work)


def refuse_strange_work(output: Output) -> None:
    """Check that nothing but an earlier run's files is in the work folder. Requires the output's lock.

    Raises:
        NekoLeanError: if it contains links or files that a run of its kind does not write, or if a rank of an earlier
            run still writes to it.
    """
    refuse_links(output.work)
    refuse_orphans(output.work)
    if output.work.is_dir():
        reason = why_not_our_work(output.work, output.kind)
        if reason is not None:
            raise NekoLeanError(f"{output.work} {reason}: move it away, or choose another --out.")


def refuse_unfinished(output: Output, resume: bool) -> None:
    """Raise NekoLeanError if there is an unfinished run and the user asked neither to resume nor to replace it."""
    if output.work.exists() and not resume and not output.overwrite:
        raise NekoLeanError(
            f"{output.work} holds an unfinished run: continue with --resume, or start anew with --overwrite."
        )


def refuse_unplanned(work: Path, plan: str) -> None:
    """Raise NekoLeanError if a work folder has files but no plan file, as another command may have left it.

    Temporary files, whose names begin with a dot, do not count.
    """
    names = sorted(path.name for path in work.iterdir() if not path.name.startswith("."))
    if names:
        raise NekoLeanError(
            f"{work} holds {names[0]} but no {plan}, so it cannot be resumed: start anew with --overwrite."
        )
