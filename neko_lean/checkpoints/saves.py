"""One save of a training run: a folder that is either complete or absent, and whose damage is detected.

weights-000.safetensors, ...    trainable parameters; with several ranks each writes its part,
                                weights-rank00000-000.safetensors, ...
state-000.safetensors, ...      optimizer state and random generators, likewise
state.json                      identity of the run and RunState
metrics.jsonl                   one line for each step so far
manifest.json                   size and SHA-256 of each of these files, and its own checksum
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neko_lean.checkpoints.run_state import RunState
from neko_lean.checkpoints.sealing import MALFORMED, find_damage, seal, was_changed
from neko_lean.checkpoints.tensors import WEIGHTS, StoredTensors, stored_tensors, write_tensors
from neko_lean.distributed import is_main_process, raise_on_any_rank, run_on_main_and_broadcast
from neko_lean.errors import NekoLeanError, first_line
from neko_lean.outputs import explained_write_errors, remove_tree, sync

FORMAT_VERSION = 3
STATE = "state.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Save:
    """An intact save."""

    folder: Path
    state: RunState
    identity: dict[str, Any]
    """Inputs that determine the run's final weights."""
    versions: dict[str, str]
    """Package versions that the run was started with."""

    def tensors(self, stem: str, prefix: str = "") -> StoredTensors:
        """This rank's tensors whose names start with `prefix`, under the rest of their names.

        Args:
            stem: "weights" or "state".
            prefix: "random." or "optimizer." for a part of the state.
        """
        return stored_tensors(self.folder, stem, prefix)


def write_save(
    target: Path,
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    state: RunState,
    metrics: Path,
) -> None:
    """Write a save and seal it. All ranks call this: each writes its tensors, the main process everything else.

    Args:
        target: folder of the save.
        weights: trainable parameters by name.
        tensors: optimizer state and random generators by name.
        header: `identity` and `versions` of the run.
        state: where the run stands.
        metrics: metrics.jsonl to copy.

    Raises NekoLeanError if it cannot be written.
    """

    def write_rank_tensors(folder: Path) -> None:
        write_tensors(folder, WEIGHTS, weights)
        write_tensors(folder, "state", tensors)

    def finish(folder: Path) -> None:
        content = {"format_version": FORMAT_VERSION, **header, "state": asdict(state)}
        (folder / STATE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copyfile(metrics, folder / METRICS)
        seal(folder)

    write_ranks(target, write_rank_tensors, finish)
    if is_main_process():
        sync(target.parent)
    run_on_main_and_broadcast(lambda: None)  # wait until the save is complete


def write_ranks(
    target: Path, write: Callable[[Path], None], finish: Callable[[Path], None] = lambda folder: None
) -> None:
    """Create a folder atomically to which all ranks write. All ranks call this.

    Args:
        target: the folder.
        write: writes one rank's part to the folder that it is given.
        finish: writes the rest, on the main process, once every rank has written its part.

    Raises NekoLeanError if it cannot be written.
    """

    def fill(folder: Path) -> None:
        run_on_main_and_broadcast(lambda: None)  # wait until the folder exists
        raise_on_any_rank(explained_write_errors(target)(lambda: write(folder)))
        if is_main_process():
            finish(folder)

    if is_main_process():
        write_folder(target, fill)
    else:
        fill(_temporary(target))


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder atomically: `fill` writes to a temporary one, which is then renamed to `target`.

    Raises NekoLeanError if it cannot be written; nothing is left behind then.
    """
    temporary = _temporary(target)
    try:
        with explained_write_errors(target):
            remove_tree(temporary)
            temporary.mkdir()
            fill(temporary)
            remove_tree(target)  # written by an interrupted run after the save that this run resumed from
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(target: Path) -> Path:
    """Name of a folder while it is being written."""
    return target.with_name(f".{target.name}.tmp")


def read_save(folder: Path) -> Save | str:
    """Read the save in a folder. Returns a description of the damage if it is damaged.

    Raises NekoLeanError for a save of another version of neko-lean, and if a file cannot be read.
    """
    refuse_other_format(folder)
    damage = find_damage(folder)
    if damage is not None:
        return damage

    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    try:
        return Save(folder, RunState(**content["state"]), content["identity"], content["versions"])
    except (KeyError, TypeError) as error:  # not damage: the checksums match
        raise NekoLeanError(
            f"{folder} was written by another version of neko-lean ({first_line(error)}); resume with that version, or "
            f"start anew with --overwrite."
        ) from error


def refuse_other_format(folder: Path) -> None:
    """Raise NekoLeanError for a save in another format, before this version's rules are applied to its files."""
    try:
        content = json.loads((folder / STATE).read_bytes())
        version, writer = content["format_version"], content.get("versions", {}).get("neko-lean", "unknown")
    except (OSError, *MALFORMED):
        return
    if version != FORMAT_VERSION and not was_changed(folder / STATE):
        raise NekoLeanError(
            f"{folder} has format version {version!r}, written by neko-lean {writer}, but this version reads only "
            f"{FORMAT_VERSION}; resume with that version, or start anew with --overwrite."
        )


def best_step(folder: Path) -> int:
    """Step of the best evaluation according to a save; 0 if there was none or the save cannot be read."""
    try:
        return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["state"]["best_step"])
    except (OSError, *MALFORMED):
        return 0
