"""The folder beside an output in which a run lives until it is complete: `.NAME.saved`.

It holds the last saves of the run, the checkpoints of the evaluations that they count as the best, metrics.jsonl, the
teacher's cache if the run makes its own, and at last the output: `output` while it is written, `complete` once all of
it is on the disk. That moves to its place as a whole, and the folder is removed. A run that is killed leaves the folder
behind, and `--resume` continues from it.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neko_lean.checkpoints.run_identity import differences, digests, versions
from neko_lean.checkpoints.saves import (
    METRICS,
    RunState,
    Save,
    best_step,
    damage,
    read_save,
    seal,
    write_folder,
    write_save,
)
from neko_lean.distributed import is_main_process, rank, require_shared_folder, run_on_main_and_broadcast
from neko_lean.errors import Interrupted, NekoLeanError, UnpublishedError
from neko_lean.jsonio import json_object
from neko_lean.models import CausalLM, save_checkpoint
from neko_lean.outputs import (
    RUN,
    Output,
    empty_folder,
    explained_write_errors,
    locked,
    publish,
    refuse_occupied,
    refuse_strange_work,
    remove_replaced,
    remove_tree,
    restore_interrupted,
    sync,
    sync_tree,
    working_in,
)
from neko_lean.terminal import log_line

KEPT = 2  # saves: the last, and the one before it for when the last is found damaged


STAGE, COMPLETE = "output", "complete"  # the output while it is written, and when all of it is on the disk


DAMAGED = "damaged-"  # before the name of a save that was found so


@dataclass
class RunFolder:
    """A run's folder. `identity` is what makes the run: another's saves are refused."""

    output: Output
    identity: dict[str, Any]
    save_every: int = 0
    resume: bool = False
    unrecoverable: bool = False  # the run failed and would again: nothing of it is worth keeping
    found: Save | None = None  # what there was to go on from when the run began

    @property
    def folder(self) -> Path:
        return self.output.work

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS if is_main_process() else Path(os.devnull)

    @property
    def cache(self) -> Path:
        """Where the run's own teacher cache lies."""
        return self.folder / "cache"

    def best(self, step: int) -> Path:
        """The checkpoint of the evaluation after a step."""
        return self.folder / f"best-{step:08d}"

    def saves(self) -> list[Path]:
        """The saves there are, the last one first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def newest(self) -> Save | None:
        """The last save that is whole, for all ranks the one that the first finds; see `_newest`."""
        found: Save | None = None

        def name() -> str | None:
            nonlocal found
            found = self._newest()
            return None if found is None else found.folder.name

        chosen = run_on_main_and_broadcast(name)
        if chosen is not None and found is None:
            seen = read_save(self.folder / chosen)
            if not isinstance(seen, Save):
                raise NekoLeanError(f"rank {rank()} cannot read {self.folder / chosen}: {seen}.")
            found = seen
        return found

    def _newest(self) -> Save | None:
        """The last save that is whole, itself and its best evaluation. Damaged ones are named and moved aside.

        Raises NekoLeanError, naming what differs, when it is of another run; and for a save that cannot be judged,
        because another version wrote it or the disk does not give its files.
        """
        for folder in self.saves():
            found = read_save(folder)
            if isinstance(found, Save) and found.state.best_step:
                best = damage(self.best(found.state.best_step))
                found = found if best is None else f"of its best checkpoint, {best}"
            if isinstance(found, Save):
                changed = differences(found.identity, self.identity)
                if changed:
                    raise NekoLeanError(
                        f"{self.folder} holds a run with another {', '.join(changed)}: give the same again, or start "
                        "anew with --overwrite."
                    )
                return found
            aside = free_name(folder.with_name(DAMAGED + folder.name))
            with explained_write_errors(self.folder):
                folder.rename(aside)
            then = "continuing from the save before it" if self.saves() else "no other is left"
            log_line(f"warning: {folder} is damaged ({found}) and now called {aside.name}: {then}.")
        return None

    def save(self, state: RunState, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Write a save, then remove what none of the last two needs."""
        if state.best_step and is_main_process():
            with explained_write_errors(self.folder):
                seal(self.best(state.best_step))
        about = {"identity": self.identity, "versions": versions()}
        write_save(self.folder / f"step-{state.step:08d}", weights, tensors, about, state, self.metrics)
        if is_main_process():
            for old in self.saves()[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
            self.prune(state.best_step)

    def keep_best(self, step: int, model: CausalLM, tokenizer: Any) -> None:
        """Write the checkpoint of the evaluation after `step`; the one before goes, unless a save needs it."""

        def fill(folder: Path) -> None:
            save_checkpoint(model, tokenizer, folder)

        if is_main_process():
            write_folder(self.best(step), fill)
            self.prune(step)
        else:
            fill(self.best(step))

    def prune(self, step: int) -> None:
        """Remove the best evaluations' checkpoints but that of `step` and those of the saves."""
        wanted = {self.best(step), *(self.best(best_step(save)) for save in self.saves())}
        for path in self.folder.glob("best-*"):
            if path not in wanted:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def output_folder(self) -> Iterator[Path]:
        """An empty folder that becomes the output when the block ends well."""
        stage, complete = self.folder / STAGE, self.folder / COMPLETE
        if not is_main_process():
            yield stage
            return
        with explained_write_errors(self.output.path):
            remove_tree(stage)
            stage.mkdir()
            yield stage
            sync_tree(stage)
            stage.rename(complete)
            publish(complete, self.output)

    def kept(self) -> str | None:
        """What there is to go on from, in a sentence."""
        saves = self.saves()
        if self.unrecoverable:
            return None
        if (self.folder / COMPLETE).is_dir():
            return f"{self.folder} keeps the finished run"
        if saves:
            return f"{self.folder} keeps the run as of step {int(saves[0].name.removeprefix('step-'))}"
        cached = any(self.folder.glob("*cache*/*.safetensors"))
        return f"{self.folder} keeps what the teacher's cache has so far" if cached else None


@contextmanager
def open_run_folder(
    output: Output, identity: dict[str, Any], *, save_every: int = 0, resume: bool = False
) -> Iterator[RunFolder]:
    """The folder of the run that is to become `output`: that of the run to continue, or an empty one.

    It is removed at the end, unless an error or a signal leaves something in it to continue from, or the finished
    output could not be moved. Raises NekoLeanError when the output may not be replaced, when an unfinished run is in
    the way, when another process is at work on the same output, or when the folder cannot be written to.
    """
    run = RunFolder(output, identity, save_every, resume)
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(locked(output))
            with explained_write_errors(output.path):
                restore_interrupted(output)
                refuse_occupied(output)
                refuse_strange_work(output)
                if not resume and not output.overwrite and run.kept():
                    raise NekoLeanError(f"{run.kept()}: continue with --resume, or start anew with --overwrite.")
                if resume:
                    _refuse_complete_of_another(run)
                run.folder.mkdir(exist_ok=True)
                sync(run.folder.parent)

        run_on_main_and_broadcast(begin)
        require_shared_folder(run.folder)
        held.enter_context(working_in(run.folder))
        # Nothing is removed before the saves were compared with this run.
        run.found = run.newest() if resume else None
        run_on_main_and_broadcast(lambda: _tidy(run))
        if run.found is not None and run.found.versions != versions():
            log_line(
                "warning: the run was begun with other versions of its packages: its end may differ in the last bits."
            )
        try:
            yield run
        except BaseException as error:
            if is_main_process():
                _leave(run, error)
            raise
        if is_main_process():
            _clear(run.folder)


def _refuse_complete_of_another(run: RunFolder) -> None:
    """Raise NekoLeanError where another run is complete and has only to be moved: its work would be lost."""
    found = _run_json(run.folder / COMPLETE)
    begun, wanted = (found or {}).get("made_from"), digests(run.identity)
    if not isinstance(begun, dict):
        return
    changed = sorted(key for key in {*begun, *wanted} if begun.get(key) != wanted.get(key))
    if changed:
        raise NekoLeanError(
            f"{run.folder} keeps a finished run with another {', '.join(changed)}: give the same again, or start anew "
            f"with --overwrite."
        )


def _tidy(run: RunFolder) -> None:
    """Remove what nothing can continue from; without `resume` that is everything."""

    def keep(name: str) -> bool:
        return run.resume and name.startswith(("step-", "best-", DAMAGED, "cache", ".cache."))

    with explained_write_errors(run.output.path):
        empty_folder(run.folder, keep)
    run.prune(run.found.state.best_step if run.found else 0)


def _leave(run: RunFolder, error: BaseException) -> None:
    """Keep the folder if there is something to continue from, and say so with the error; remove it otherwise."""
    kept = run.kept()
    if isinstance(error, UnpublishedError):
        error.args = (f"{error} Or mend that and run the same again with --resume.",)
    elif kept is None:
        if not any(run.folder.glob(f"{DAMAGED}*")):
            _clear(run.folder)
    elif isinstance(error, Interrupted):
        error.saved_state = kept
    elif isinstance(error, NekoLeanError):
        error.args = (f"{error} {kept}: continue with --resume.",)
    else:
        log_line(f"{kept}: continue with --resume.")


def _clear(folder: Path) -> None:
    """Remove a work folder that has served. What cannot be removed is named, not an error: the result is in its
    place."""
    try:
        remove_tree(folder)
    except OSError as error:
        log_line(f"warning: {folder} cannot be removed ({error.strerror}): nothing needs it any more.")


def free_name(path: Path) -> Path:
    """`path`, or the first of PATH-2, PATH-3, ... that is not taken."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not os.path.lexists(path) else next(one for one in numbered if not os.path.lexists(one))


def finished_run(output: Output, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What run.json says if this very run is complete already: in its place, or in its work folder, from where it is
    moved there now. What the run has left in its work folder is removed; another run's stays.

    Raises NekoLeanError when another process is writing the output, or when the move fails.
    """

    def look() -> dict[str, Any] | None:
        complete = output.work / COMPLETE
        if _complete_run(output.path, identity) is None and _complete_run(complete, identity) is None:
            return None
        with locked(output), explained_write_errors(output.path):
            restore_interrupted(output)
            if _complete_run(output.path, identity) is None:
                if _complete_run(complete, identity) is None:
                    return None  # another run came in between
                refuse_strange_work(output)
                publish(complete, output)
            # Nothing else next to it is of any use now.
            left = [read_save(folder) for folder in RunFolder(output, {}).saves()]
            if not any(isinstance(one, Save) and differences(one.identity, identity) for one in left):
                refuse_strange_work(output)
                _clear(output.work)
            remove_replaced(output)
            return _complete_run(output.path, identity)

    return run_on_main_and_broadcast(look)


def _complete_run(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What run.json in `folder` says, if that is the complete output of this very run."""
    run = _run_json(folder)
    return run if run is not None and run.get("made_from") == digests(identity) else None


def _run_json(folder: Path) -> dict[str, Any] | None:
    """The run.json in a folder, where there is one that can be read."""
    try:
        return json_object(folder / RUN)
    except OSError:
        return None


def link_tree(source: Path, target: Path, ignore: Iterable[str] = ()) -> None:
    """The files of a folder in another one as well: linked where the file system can, else copied."""

    def link(one: str, two: str) -> None:
        try:
            os.link(one, two)
        except OSError:
            shutil.copy2(one, two)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignore))
