"""The folder beside an output in which a run lives until it is complete: `.NAME.saved`.

It holds the last saves of the run, the checkpoints of the evaluations that they count as the best, metrics.jsonl, the
teacher's cache if the run makes its own, and at last the output: `output` while it is written, `complete` once all of
it is on the disk. That moves to its place as a whole, and the folder is removed. A run that is killed leaves the folder
behind, and `--resume` continues from it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from neko_lean import __version__
from neko_lean.checkpoints import METRICS, RunState, Save, best_step, damage, read_save, seal, write_folder, write_save
from neko_lean.collective import by_first, refuse_unseen
from neko_lean.data import Encoded
from neko_lean.errors import NekoLeanError
from neko_lean.files import json_object
from neko_lean.identity import config_differences
from neko_lean.modeling import CausalLM
from neko_lean.outputs import (
    Output,
    UnpublishedError,
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
from neko_lean.progress import say
from neko_lean.ranks import leads, rank
from neko_lean.sharding import save_checkpoint
from neko_lean.signals import Interrupted

RUN = "run.json"
KEPT = 2  # saves: the last, and the one before it for when the last is found damaged
STAGE, COMPLETE = "output", "complete"  # the output while it is written, and when all of it is on the disk
DAMAGED = "damaged-"  # before the name of a save that was found so
MAY_DIFFER = ("offload_state", "offload_activations")  # of a recipe: where things lie changes no bit of the result


def versions() -> dict[str, str]:
    """Versions of neko-lean and of the packages that decide a run's numbers."""
    names = ("torch", "transformers", "bitsandbytes", "safetensors", "numpy")
    return {"neko-lean": __version__, **{name: version(name) for name in names}}


def rows_digest(encoded: Iterable[Encoded]) -> str:
    """SHA-256 over rows as a run reads them: their text and their tokens."""
    digest = hashlib.sha256()
    for one in encoded:
        digest.update(json.dumps([one.row.digest, one.row.task, one.prompt, one.ids]).encode())
    return digest.hexdigest()


@dataclass
class Unfinished:
    """A run's folder. `identity` is what makes the run: another's saves are refused."""

    output: Output
    identity: dict[str, Any]
    save_every: int = 0
    resume: bool = False
    hopeless: bool = False  # the run failed and would again: nothing of it is worth keeping
    found: Save | None = None  # what there was to go on from when the run began

    @property
    def folder(self) -> Path:
        return self.output.work

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS if leads() else Path(os.devnull)

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

        chosen = by_first(name)
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
            say(f"warning: {folder} is damaged ({found}) and now called {aside.name}: {then}.")
        return None

    def save(self, state: RunState, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Write a save, then remove what none of the last two needs."""
        if state.best_step and leads():
            with explained_write_errors(self.folder):
                seal(self.best(state.best_step))
        about = {"identity": self.identity, "versions": versions()}
        write_save(self.folder / f"step-{state.step:08d}", weights, tensors, about, state, self.metrics)
        if leads():
            for old in self.saves()[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
            self.prune(state.best_step)

    def keep_best(self, step: int, model: CausalLM, tokenizer: Any) -> None:
        """Write the checkpoint of the evaluation after `step`; the one before goes, unless a save needs it."""

        def fill(folder: Path) -> None:
            save_checkpoint(model, tokenizer, folder)

        if leads():
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
        if not leads():
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
        if self.hopeless:
            return None
        if (self.folder / COMPLETE).is_dir():
            return f"{self.folder} keeps the finished run"
        if saves:
            return f"{self.folder} keeps the run as of step {int(saves[0].name.removeprefix('step-'))}"
        cached = any(self.folder.glob("*cache*/*.safetensors"))
        return f"{self.folder} keeps what the teacher's cache has so far" if cached else None


@contextmanager
def unfinished(
    output: Output, identity: dict[str, Any], *, save_every: int = 0, resume: bool = False
) -> Iterator[Unfinished]:
    """The folder of the run that is to become `output`: that of the run to continue, or an empty one.

    It is removed at the end, unless an error or a signal leaves something in it to continue from, or the finished
    output could not be moved. Raises NekoLeanError when the output may not be replaced, when an unfinished run is in
    the way, when another process is at work on the same output, or when the folder cannot be written to.
    """
    run = Unfinished(output, identity, save_every, resume)
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

        by_first(begin)
        refuse_unseen(run.folder)
        held.enter_context(working_in(run.folder))
        # Nothing is removed before the saves were compared with this run.
        run.found = run.newest() if resume else None
        by_first(lambda: _tidy(run))
        if run.found is not None and run.found.versions != versions():
            say("warning: the run was begun with other versions of its packages: its end may differ in the last bits.")
        try:
            yield run
        except BaseException as error:
            if leads():
                _leave(run, error)
            raise
        if leads():
            _clear(run.folder)


def _refuse_complete_of_another(run: Unfinished) -> None:
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


def _tidy(run: Unfinished) -> None:
    """Remove what nothing can continue from; without `resume` that is everything."""

    def keep(name: str) -> bool:
        return run.resume and name.startswith(("step-", "best-", DAMAGED, "cache", ".cache."))

    with explained_write_errors(run.output.path):
        empty_folder(run.folder, keep)
    run.prune(run.found.state.best_step if run.found else 0)


def _leave(run: Unfinished, error: BaseException) -> None:
    """Keep the folder if there is something to continue from, and say so with the error; remove it otherwise."""
    kept = run.kept()
    if isinstance(error, UnpublishedError):
        error.args = (f"{error} Or mend that and run the same again with --resume.",)
    elif kept is None:
        if not any(run.folder.glob(f"{DAMAGED}*")):
            _clear(run.folder)
    elif isinstance(error, Interrupted):
        error.kept = kept
    elif isinstance(error, NekoLeanError):
        error.args = (f"{error} {kept}: continue with --resume.",)
    else:
        say(f"{kept}: continue with --resume.")


def _clear(folder: Path) -> None:
    """Remove a work folder that has served. What cannot be removed is named, not an error: the result is in its
    place."""
    try:
        remove_tree(folder)
    except OSError as error:
        say(f"warning: {folder} cannot be removed ({error.strerror}): nothing needs it any more.")


def free_name(path: Path) -> Path:
    """`path`, or the first of PATH-2, PATH-3, ... that is not taken."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not os.path.lexists(path) else next(one for one in numbered if not os.path.lexists(one))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of what makes two runs differ; of a recipe and of a seed with both values."""
    found = []
    for key in sorted({*old, *new}):
        one, two = old.get(key), new.get(key)
        if key == "recipe" and isinstance(one, dict) and isinstance(two, dict):
            values = [k for k in sorted({*one, *two}) if one.get(k) != two.get(k) and k not in MAY_DIFFER]
            found += [f"recipe value {k} ({one.get(k)}, now {two.get(k)})" for k in values]
        elif key == "config" and isinstance(one, dict) and isinstance(two, dict):
            found += [f"config value {changed}" for changed in config_differences(one, two)]
        elif key == "config" and one is None:
            found.append("config.json (the version that began it did not write it down)")
        elif one != two:
            found.append(f"{key} ({one}, now {two})" if key in ("command", "device", "ranks", "seed") else key)
    return found


def digests(identity: Mapping[str, Any]) -> dict[str, str]:
    """An identity in a few characters a part, for run.json."""
    recipe = {k: v for k, v in identity["recipe"].items() if k not in MAY_DIFFER}
    parts = {**identity, "recipe": recipe}
    return {k: hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest()[:16] for k, v in parts.items()}


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
            left = [read_save(folder) for folder in Unfinished(output, {}).saves()]
            if not any(isinstance(one, Save) and differences(one.identity, identity) for one in left):
                refuse_strange_work(output)
                _clear(output.work)
            remove_replaced(output)
            return _complete_run(output.path, identity)

    return by_first(look)


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
