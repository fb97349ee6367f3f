"""One save of a training run: a folder of safetensors and JSON that is whole or not there, and says when it is damaged.

    weights-000.safetensors, ...    the parameters that learn; of several ranks each writes its part,
                                    weights-rank00000-000.safetensors, ...
    state-000.safetensors, ...      the optimizer's state and the generators of random numbers, likewise
    state.json                      what run it is of, and where that stands (RunState)
    metrics.jsonl                   a line for every step so far
    manifest.json                   size and SHA-256 of each of these, and its own

A folder is written under another name, every file and folder of it synced, and then renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neko_lean.distributed import is_main_process, raise_on_any_rank, rank, run_on_main_and_broadcast, world_size
from neko_lean.errors import NekoLeanError, first_line
from neko_lean.models import is_inside, local_shard
from neko_lean.outputs import (
    MANIFEST,
    UNSIGNED,
    explained_write_errors,
    file_sha256,
    is_signed,
    remove_tree,
    sign,
    sync,
    sync_tree,
)

FORMAT_VERSION = 1


STATE = "state.json"


METRICS = "metrics.jsonl"


# Bytes of tensors that go into one file, so that a copy of no more than these has to leave the GPU at once.
PIECE = 2**29


@dataclass
class RunState:
    """Where a run stands, but for its tensors."""

    micro_tokens: int  # positions a micro-batch may have now: the recipe's, or fewer after the GPU's memory ran out
    head_chunk: int | None = None  # rows of the head's chunks, where that was made smaller
    step: int = 0  # steps done
    best: float | None = None  # of the evaluations, by the recipe's rule
    best_step: int = 0
    worse: int = 0  # evaluations since the best
    unseen: list[float] = field(default_factory=lambda: [0.0, 0.0])  # losses on the anchor lately: student, teacher
    positions: int = 0
    tokens: int = 0
    waited: float = 0.0  # seconds that steps stood still for their batch
    wall: float = 0.0  # seconds that the run has taken
    peak: dict[str, int] = field(default_factory=dict)  # memory.peak_memory
    largest: list[list[int]] = field(default_factory=list)  # micro-batches of the step with the most positions, [b, l]
    wanted: list[int] = field(default_factory=list)  # positions of each of these that reached the head


@dataclass(frozen=True)
class Save:
    """A save that was found whole."""

    folder: Path
    state: RunState
    identity: dict[str, Any]
    versions: dict[str, str]

    def tensors(self, stem: str, prefix: str = "") -> Stored:
        """This rank's, whose names begin with `prefix`, by the rest of their names."""
        return Stored(sorted(self.folder.glob(f"{_of_rank(stem)}-*.safetensors")), prefix)


class Stored(Mapping[str, Tensor]):
    """Tensors in safetensors files, each read when it is asked for."""

    def __init__(self, files: list[Path], prefix: str) -> None:
        self._prefix = prefix
        self._home: dict[str, Any] = {}
        for file in files:
            opened = safe_open(file, framework="pt")
            self._home.update({name: opened for name in opened.keys() if name.startswith(prefix)})  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._home[self._prefix + name].get_tensor(self._prefix + name)
        return found

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._home)

    def __len__(self) -> int:
        return len(self._home)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write into a folder that then becomes `target`, or vanishes when that fails.

    Raises NekoLeanError when it cannot be written.
    """
    temporary = _temporary(target)
    try:
        with explained_write_errors(target):
            remove_tree(temporary)
            temporary.mkdir()
            fill(temporary)
            remove_tree(target)  # from a run that was cut off after the save that this one continues from
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(target: Path) -> Path:
    """Where a folder lies while it is being written."""
    return target.with_name(f".{target.name}.tmp")


def write_save(
    target: Path,
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    state: RunState,
    metrics: Path,
) -> None:
    """Write a save and seal it. `about` names the run: its `identity` and `versions`. Ranks all have to call it: each
    writes its tensors, the first one all else."""

    def fill(folder: Path) -> None:
        run_on_main_and_broadcast(lambda: None)  # the folder is there
        raise_on_any_rank(explained_write_errors(target)(lambda: _write_all(folder, weights=weights, state=tensors)))
        if not is_main_process():
            return
        written = {"format_version": FORMAT_VERSION, **about, "state": asdict(state)}
        (folder / STATE).write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copyfile(metrics, folder / METRICS)
        seal(folder)

    if is_main_process():
        write_folder(target, fill)
        sync(target.parent)
    else:
        fill(_temporary(target))
    run_on_main_and_broadcast(lambda: None)  # the save is there


def _of_rank(stem: str) -> str:
    """What the names of a rank's files of tensors begin with."""
    return stem if world_size() == 1 else f"{stem}-rank{rank():05d}"


def _write_all(folder: Path, **groups: Mapping[str, Tensor]) -> None:
    for stem, tensors in groups.items():
        _write_tensors(folder, _of_rank(stem), tensors)


def _write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    pieces: list[dict[str, Tensor]] = [{}]
    room = PIECE
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if pieces[-1] and size > room:
            pieces.append({})
            room = PIECE
        pieces[-1][name] = local_shard(tensor.detach()).contiguous()
        room -= size
    for number, piece in enumerate(pieces):
        save_file(piece, folder / f"{stem}-{number:03d}.safetensors")


def seal(folder: Path) -> None:
    """Write the manifest of what a folder holds, and put all of it on the disk. Sealing twice does nothing."""
    if (folder / MANIFEST).is_file():
        return
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"files": files, "checksum": UNSIGNED}, indent=1, ensure_ascii=False) + "\n"
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_bytes(sign(text.encode()))
    sync_tree(folder)
    temporary.replace(folder / MANIFEST)
    sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, by its manifest; None when it is as it was written.

    Raises NekoLeanError when the disk does not give a file, which says nothing about what the file holds.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
        manifest = json.loads(data.decode("utf-8"))
        if not is_signed(data, manifest["checksum"]):
            return f"{MANIFEST} was changed"
        for name, wanted in manifest["files"].items():
            path = folder / name
            if not is_inside(folder, name):
                return f"{MANIFEST} names {name!r}, which lies elsewhere"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}"
            if file_sha256(path) != wanted["sha256"]:
                return f"{name} was changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        raise NekoLeanError(
            f"{error.filename or folder} cannot be read ({error.strerror or error}), so nobody can say whether "
            f"{folder} is whole: mend that and run again, or move it away."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({first_line(error)})"
    return None


def read_save(folder: Path) -> Save | str:
    """The save in a folder, or what is wrong with it.

    Raises NekoLeanError for a save that another version of neko-lean wrote, and as `damage` does.
    """
    refuse_other_format(folder)
    wrong = damage(folder)
    if wrong is not None:
        return wrong
    written = json.loads((folder / STATE).read_text(encoding="utf-8"))
    try:
        return Save(folder, RunState(**written["state"]), written["identity"], written["versions"])
    except (KeyError, TypeError) as error:
        # Its checksums are right, so this is how it was written.
        raise NekoLeanError(
            f"{folder} was written by another version of neko-lean ({first_line(error)}): resume with that one, or "
            f"start anew with --overwrite."
        ) from error


def refuse_other_format(folder: Path) -> None:
    """Raise NekoLeanError for a save in another format, before its files are judged by the rules of this one."""
    try:
        written = json.loads((folder / STATE).read_bytes())
        version, writer = written["format_version"], written.get("versions", {}).get("neko-lean", "unknown")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if version != FORMAT_VERSION and not _was_changed(folder / STATE):
        raise NekoLeanError(
            f"{folder} has format version {version!r}, written by neko-lean {writer}; this one reads {FORMAT_VERSION}: "
            f"resume with that version, or start anew with --overwrite."
        )


def best_step(folder: Path) -> int:
    """The step of the evaluation that a save counts as its best; 0 where it has none or cannot say."""
    try:
        return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["state"]["best_step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def _was_changed(file: Path) -> bool:
    """Whether the manifest next to a file, itself as it was written, has another checksum for it."""
    try:
        data = (file.parent / MANIFEST).read_bytes()
        manifest = json.loads(data.decode("utf-8"))
        signed = is_signed(data, manifest["checksum"])
        return signed and bool(manifest["files"][file.name]["sha256"] != file_sha256(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


@torch.no_grad()
def load_weights(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into these parameters, by name."""
    for name, parameter in parameters.items():
        local_shard(parameter).copy_(stored[name])


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Torch's own generators, which dropout draws from."""
    states = {"host": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on from what `random_states` gave."""
    torch.set_rng_state(states["host"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
