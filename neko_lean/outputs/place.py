"""Where an output goes: check, before any work, that the finished result can be moved there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from neko_lean.errors import NekoLeanError
from neko_lean.outputs.durable import refuse_links, temporary_name
from neko_lean.outputs.ownership import why_not_our_file, why_not_ours
from neko_lean.outputs.write_errors import explained_write_errors
from neko_lean.terminal import log_line

_WORK_PATH_BYTES = 200  # upper bound on how many bytes longer a path inside the work folder is than the output's path

_MOUNTS = Path("/proc/self/mountinfo")  # Linux only; elsewhere there is only os.path.ismount

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Output:
    """The path of a command's result, and the paths that a run uses next to it.

    Attributes:
        path: absolute path of the result, with all links resolved.
        kind: suffix of the work folder: 'partial', 'saved' or 'demo'.
        overwrite: whether the result may replace an output that neko-lean wrote.
    """

    path: Path
    kind: str
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """The folder that a run works in until its result is complete."""
        return self.path.with_name(f".{self.path.name}.{self.kind}")

    @property
    def lock(self) -> Path:
        """The file that a run locks."""
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def old(self) -> Path:
        """The name of a replaced output until it is removed."""
        return self.path.with_name(f".{self.path.name}.old")


def claim_folder(
    out: Source, kind: str, inputs: Iterable[Source | None], *, overwrite: bool = False, resume: bool = False
) -> Output:
    """Check that a run may write the folder `out`, and will be able to move its result there.

    Args:
        out: folder, as the user named it. Links are resolved.
        kind: suffix of the work folder, see Output.
        inputs: files and folders that the run reads. None, and names that are not paths here, are skipped.
        overwrite: allow to replace a folder that neko-lean wrote; never any other folder, and never an input.
        resume: accept an output that already exists. The caller compares it with its own run.

    Returns:
        The paths of the output.

    Raises:
        NekoLeanError: if `out` is a file, contains something that may not be replaced, is a mount point, has a name
            that is too long, or is or contains an input.
    """
    output = Output(_resolve(out), kind, overwrite)
    with explained_write_errors(output.path):
        _refuse_unusable(output, (output.work, output.old))
        _refuse_inputs(output, inputs)
        if not resume:
            refuse_occupied(output)
        for path in (output.work, output.old):
            if path.is_symlink():
                raise NekoLeanError(f"{path} is a link, and neko-lean does not work in linked folders: remove it.")
    return output


def claim_file(out: Source, option: str, inputs: Iterable[Source | None], *, overwrite: bool = False) -> Output:
    """Check that a command may write the file `out`.

    Args:
        out: file, as the user named it. Links are resolved.
        option: the command-line option that names the file, for error messages.
        inputs: as for claim_folder.
        overwrite: allow to replace a file that neko-lean wrote.

    Returns:
        The paths of the output.

    Raises:
        NekoLeanError: if `out` is a folder, exists and may not be replaced, or is an input.
    """
    output = Output(_resolve(out), "partial", overwrite)
    with explained_write_errors(output.path):
        if output.path.is_dir():
            raise NekoLeanError(f"{option} {output.path} is a folder: give the name of a file.")
        _refuse_unusable(output, (temporary_name(output.path),))
        _refuse_inputs(output, inputs)
        refuse_occupied_file(output, option)
    return output


def refuse_occupied(output: Output) -> None:
    """Raise NekoLeanError if the output's path is a file, or a non-empty folder that may not be replaced."""
    try:
        status = output.path.stat()  # only once, because another process may move the folder away at any time
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(status.st_mode):
        raise NekoLeanError(f"{output.path} is a file, not a folder: choose another --out.")
    if not any(output.path.iterdir()):
        return

    if not output.overwrite:
        raise NekoLeanError(f"{output.path} already holds something: choose another --out, or pass --overwrite.")
    reason = why_not_ours(output.path)
    if reason is not None:
        raise NekoLeanError(
            f"{output.path} {reason}, and --overwrite replaces only folders that neko-lean wrote: choose another --out."
        )


def refuse_occupied_file(output: Output, option: str) -> None:
    """Raise NekoLeanError if the output file exists and may not be replaced."""
    if not output.path.exists():
        return
    if not output.overwrite:
        raise NekoLeanError(f"{option} {output.path} already exists: choose another name, or pass --overwrite.")
    reason = why_not_our_file(output.path)
    if reason is not None:
        raise NekoLeanError(
            f"{option} {output.path} {reason}, and --overwrite replaces only files that neko-lean wrote: choose "
            f"another name."
        )


def restore_interrupted(output: Output) -> None:
    """Undo a replacement that a killed process did not finish: move the old output back. Requires the output's lock.

    Raises:
        NekoLeanError: if the folder of that name was not written by neko-lean.
    """
    if not output.old.exists():
        return
    refuse_links(output.old)
    reason = why_not_ours(output.old)
    if reason is not None:
        raise NekoLeanError(f"{output.old} {reason}, so neko-lean leaves it alone: move it away.")
    if not output.path.exists():
        output.old.rename(output.path)
        log_line(f"{output.path}: put back the output that an interrupted run had moved aside.")


def _resolve(out: Source) -> Path:
    """The absolute path of `out` without links. A dangling link is resolved, too: the output appears at its target."""
    text = os.fspath(out)
    if not text or "\0" in text:
        raise NekoLeanError("--out is empty or holds a NUL character: give the name of a folder or file.")
    with explained_write_errors(Path(text)):
        path = Path(os.path.realpath(text))
        if path.is_symlink():
            raise NekoLeanError(f"{text} is a link that leads to itself: remove it, or choose another --out.")
    if not path.name:
        raise NekoLeanError(f"{text} is the root of the file system: choose another --out.")
    return path


def _refuse_unusable(output: Output, neighbours: Iterable[Path]) -> None:
    """Raise NekoLeanError if a finished result could not be moved to the output's path.

    `neighbours` are the paths next to the output that the run uses, besides the lock.
    """
    # The folder above it.
    parent = _nearest_existing(output.path.parent)
    if not parent.is_dir():
        raise NekoLeanError(f"{output.path} cannot be written to: {parent} is a file; choose another --out.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise NekoLeanError(f"{output.path} cannot be written to: {parent} is read-only; choose another --out.")

    # A mount point cannot be replaced by a rename.
    if _is_mount(output.path):
        raise NekoLeanError(
            f"{output.path} is a mount point, which a finished folder cannot replace: choose a folder in it, such as "
            f"--out {output.path / 'out'}."
        )

    # The names next to the output are longer than its own.
    name_limit = os.pathconf(parent, "PC_NAME_MAX")
    name_bytes = _num_bytes(output.path.name)
    added_bytes = max(_num_bytes(path.name) for path in (*neighbours, output.lock)) - name_bytes
    if name_bytes + added_bytes > name_limit:
        raise NekoLeanError(
            f"{output.path.name} is a name of {name_bytes} bytes, but at most {name_limit - added_bytes} are possible "
            f"here, because neko-lean needs longer names next to it: choose a shorter --out."
        )
    path_limit = os.pathconf(parent, "PC_PATH_MAX")
    path_bytes = _num_bytes(str(output.path))
    if path_bytes + _WORK_PATH_BYTES > path_limit:
        raise NekoLeanError(
            f"{output.path.name} has a path of {path_bytes} bytes, but at most {path_limit - _WORK_PATH_BYTES} are "
            f"possible here: choose a shorter --out."
        )


def _num_bytes(name: str) -> int:
    return len(os.fsencode(name))


def _nearest_existing(folder: Path) -> Path:
    """The folder itself, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _is_mount(path: Path) -> bool:
    """Whether `path` is a mount point, also of a folder of the same file system (a bind mount)."""
    if os.path.ismount(path):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False

    # The fifth field is the mount point, in which whitespace and backslashes are escaped as in \040.
    mount_points = {line.split()[4] for line in lines if len(line.split()) > 4}
    escaped = os.fsencode(path)
    for character in (b"\\", b" ", b"\t", b"\n"):
        escaped = escaped.replace(character, b"\\%03o" % ord(character))
    return escaped in mount_points


def _refuse_inputs(output: Output, inputs: Iterable[Source | None]) -> None:
    """Raise NekoLeanError if an input is, or is inside, a folder that the run would replace or clear.

    Folders are compared by device and inode, so that the spelling of a path does not matter.
    """
    replaced = {key: path for path in (output.path, output.work, output.old) if (key := _inode(path)) is not None}
    if not replaced:
        return
    for source in inputs:
        if source is None:
            continue
        for path in _real_paths(Path(source)):
            parents = (path, *path.parents)
            folder = next((replaced[key] for parent in parents if (key := _inode(parent)) in replaced), None)
            if folder is not None:
                relation = "is" if _inode(path) == _inode(folder) else "holds"
                raise NekoLeanError(
                    f"{folder} {relation} an input of this run ({source}), which the output would replace: choose "
                    f"another --out."
                )


def _inode(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file or folder; None if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _real_paths(source: Path) -> Iterator[Path]:
    """The resolved path of an input, and the targets of the links directly inside it."""
    try:
        if not source.exists():
            return
        yield source.resolve()
        if source.is_dir():
            with os.scandir(source) as entries:
                yield from (Path(entry.path).resolve() for entry in entries if entry.is_symlink())
    except (OSError, ValueError, RuntimeError):
        return
