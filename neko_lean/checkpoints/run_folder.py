"""The folder `.NAME.saved` in which a run lives until its output is complete.

It holds the last saves of the run, the trainable weights at their best evaluations, metrics.jsonl, the teacher cache if
the run makes its own, and at the end the output: `output` while it is being written, `complete` once it is on disk.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neko_lean.checkpoints.run_identity import differences, versions
from neko_lean.checkpoints.run_state import RunState
from neko_lean.checkpoints.saves import METRICS, Save, best_step, read_save, write_ranks, write_save
from neko_lean.checkpoints.sealing import find_damage, seal
from neko_lean.checkpoints.tensors import WEIGHTS, write_tensors
from neko_lean.distributed import is_main_process, rank, run_on_main_and_broadcast
from neko_lean.errors import NekoLeanError
from neko_lean.outputs import Output, explained_write_errors, publish, remove_tree, sync_tree
from neko_lean.terminal import log_line

SAVES_TO_KEEP = 2  # the last save, and the one before it in case the last is damaged
STAGE = "output"  # the output while it is being written
COMPLETE = "complete"  # the output once all of it is on disk
DAMAGED = "damaged-"  # prefix of a save that was found damaged


@dataclass
class RunFolder:
    """The work folder of a training run. Use `open_run_folder` to create one."""

    output: Output
    """Where the result goes."""

    identity: dict[str, Any]
    """Inputs that determine the run's final weights; saves of a run with another identity are refused."""

    save_every: int = 0
    """Steps between saves; 0 saves only when a signal stops the run."""

    resume: bool = False
    """Whether to continue an interrupted run."""

    resume_from: Save | None = None
    """Save that the run continues from."""

    unrecoverable: bool = False
    """Whether the run failed and would fail again, so that nothing of it is worth keeping."""

    # Layout

    @property
    def folder(self) -> Path:
        """The work folder."""
        return self.output.work

    @property
    def metrics(self) -> Path:
        """metrics.jsonl, which only the main process writes."""
        return self.folder / METRICS if is_main_process() else Path(os.devnull)

    @property
    def cache(self) -> Path:
        """The run's own teacher cache."""
        return self.folder / "cache"

    def best_weights(self, step: int) -> Path:
        """Folder of the trainable weights at the evaluation after `step`."""
        return self.folder / f"best-{step:08d}"

    def saves(self) -> list[Path]:
        """Folders of all saves, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    # Write

    def save(self, state: RunState, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Write a save, then remove what the last two saves do not need. All ranks call this.

        Args:
            state: where the run stands.
            weights: trainable parameters by name.
            tensors: optimizer state and random generators by name.
        """
        if state.best_step and is_main_process():
            with explained_write_errors(self.folder):
                seal(self.best_weights(state.best_step))

        header = {"identity": self.identity, "versions": versions()}
        write_save(self.folder / f"step-{state.step:08d}", weights, tensors, header, state, self.metrics)

        if is_main_process():
            for old in self.saves()[SAVES_TO_KEEP:]:
                shutil.rmtree(old, ignore_errors=True)
            self.remove_old_weights(state.best_step)

    def save_best(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Write the trainable `weights` at the evaluation after `step`, and remove older ones that no save needs.

        All ranks call this; each writes its part.
        """
        write_ranks(self.best_weights(step), lambda folder: write_tensors(folder, WEIGHTS, weights))
        if is_main_process():
            self.remove_old_weights(step)

    def remove_old_weights(self, step: int) -> None:
        """Remove the weights of all evaluations except those of `step` and the best ones of the saves."""
        needed = {self.best_weights(step), *(self.best_weights(best_step(save)) for save in self.saves())}
        for path in self.folder.glob("best-*"):
            if path not in needed:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def output_folder(self) -> Iterator[Path]:
        """Yield an empty folder that becomes the output when the block succeeds. All ranks call this."""
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

    # Read

    def latest_save(self) -> Save | None:
        """The newest intact save. The main process chooses it, and all ranks read the same one.

        Damaged saves are reported and renamed.

        Raises NekoLeanError if the save belongs to a run with another identity or was written by another version, or
        if it cannot be read.
        """
        save: Save | None = None

        def choose() -> str | None:
            nonlocal save
            save = self._find_latest_save()
            return None if save is None else save.folder.name

        name = run_on_main_and_broadcast(choose)
        if name is not None and save is None:  # on all ranks but the main process
            result = read_save(self.folder / name)
            if not isinstance(result, Save):
                raise NekoLeanError(f"rank {rank()} cannot read {self.folder / name}: {result}.")
            save = result
        return save

    def _find_latest_save(self) -> Save | None:
        """`latest_save` on the main process."""
        for folder in self.saves():
            result = self._read_save_and_best(folder)
            if isinstance(result, Save):
                self._refuse_other_identity(result)
                return result

            renamed = free_name(folder.with_name(DAMAGED + folder.name))
            with explained_write_errors(self.folder):
                folder.rename(renamed)
            start = "continues from the previous save" if self.saves() else "starts from the beginning"
            log_line(f"warning: the run {start}: {folder} is damaged ({result}) and was renamed to {renamed.name}.")
        return None

    def refuse_other_saves(self) -> None:
        """Raise NekoLeanError as `latest_save` does, but leave damaged saves as they are."""
        for folder in self.saves():
            result = self._read_save_and_best(folder)
            if isinstance(result, Save):
                self._refuse_other_identity(result)
                return

    def _refuse_other_identity(self, save: Save) -> None:
        changed = differences(save.identity, self.identity)
        if changed:
            raise NekoLeanError(
                f"{self.folder} holds a run with another {', '.join(changed)}; give the original values again, or "
                f"start anew with --overwrite."
            )

    def _read_save_and_best(self, folder: Path) -> Save | str:
        """`read_save`, which also checks the weights of the save's best evaluation."""
        result = read_save(folder)
        if isinstance(result, Save) and result.state.best_step:
            damage = find_damage(self.best_weights(result.state.best_step))
            if damage is not None:
                return f"in the weights of its best evaluation, {damage}"
        return result

    def describe_progress(self) -> str | None:
        """A sentence about what a later run can continue from, or None if there is nothing."""
        saves = self.saves()
        if self.unrecoverable:
            return None
        if (self.folder / COMPLETE).is_dir():
            return f"{self.folder} keeps the finished run"
        if saves:
            return f"{self.folder} keeps the run as of step {int(saves[0].name.removeprefix('step-'))}"
        has_cache = any(self.folder.glob("*cache*/*.safetensors"))
        return f"{self.folder} keeps what the teacher's cache has so far" if has_cache else None


def free_name(path: Path) -> Path:
    """`path`, or the first of PATH-2, PATH-3, ... that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not os.path.lexists(candidate))
