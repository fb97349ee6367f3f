"""The place of an output: checked before any work, so that a finished run can be moved there at its end."""

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

_DEEPEST = 200  # bytes that names inside a work folder add to its path, at most


_MOUNTS = Path("/proc/self/mountinfo")  # Linux only; elsewhere os.path.ismount has to do


Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Output:
    """Where a command's result will lie, and the names it uses next to it until then."""

    path: Path  # absolute, with every link in it resolved
    kind: str  # of work folder: 'partial', 'saved' or 'demo'
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """The folder that a run works in."""
        return self.path.with_name(f".{self.path.name}.{self.kind}")

    @property
    def lock(self) -> Path:
        """The file whose lock a run holds."""
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def old(self) -> Path:
        """Where an output that is replaced lies for a moment."""
        return self.path.with_name(f".{self.path.name}.old")


def claim_folder(
    out: Source, kind: str, inputs: Iterable[Source | None], *, overwrite: bool = False, resume: bool = False
) -> Output:
    """Check that a run may write the folder `out`, and could move its result there, before it does any work.

    Args:
        out: folder as the user named it; links in it are resolved.
        kind: suffix of the folder to work in, see Output.
        inputs: files and folders that the run reads; None and names that are no path here are skipped.
        overwrite: replace a folder that a command of neko-lean wrote; never another one, and never an input.
        resume: do not mind an output that is there already: the caller compares it with its own run.

    Raises NekoLeanError when `out` is a file, holds something that may not be replaced, is a mount point, has too long
    a name, or when an input is `out` or lies in it.
    """
    output = Output(_resolved(out), kind, overwrite)
    with explained_write_errors(output.path):
        _refuse_place(output, (output.work, output.old))
        _refuse_inputs(output, inputs)
        if not resume:
            refuse_occupied(output)
        for path in (output.work, output.old):
            if path.is_symlink():
                raise NekoLeanError(f"{path} is a link, and neko-lean works in no linked folder: remove it.")
    return output


def claim_file(out: Source, option: str, inputs: Iterable[Source | None], *, overwrite: bool = False) -> Output:
    """Check, before any work, that a command may write the file `out`; the arguments are those of claim_folder.

    Raises NekoLeanError, naming `option`, when `out` is a folder, exists and may not be replaced, or is an input.
    """
    output = Output(_resolved(out), "partial", overwrite)
    with explained_write_errors(output.path):
        if output.path.is_dir():
            raise NekoLeanError(f"{option} {output.path} is a folder: give the name of a file.")
        _refuse_place(output, (temporary_name(output.path),))
        _refuse_inputs(output, inputs)
        refuse_occupied_file(output, option)
    return output


def refuse_occupied(output: Output) -> None:
    """Raise NekoLeanError when the output is a file, or a folder that holds something and may not be replaced."""
    try:
        found = output.path.stat()  # once: another process may move it away at any time
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(found.st_mode):
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
    """Raise NekoLeanError when the file is there and may not be replaced."""
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
    """Finish what a process left that was killed while it replaced an output. Needs the output's lock.

    Raises NekoLeanError when the folder of that name is not one of ours.
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


def _resolved(out: Source) -> Path:
    """`out` without links. A link that leads nowhere yet is resolved too: the output appears where it leads."""
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


def _refuse_place(output: Output, temporary: Iterable[Path]) -> None:
    """Raise NekoLeanError for a place that a finished result could not be moved to."""
    parent = _nearest(output.path.parent)
    if not parent.is_dir():
        raise NekoLeanError(f"{output.path} cannot be written to: {parent} is a file; choose another --out.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise NekoLeanError(f"{output.path} cannot be written to: {parent} is read-only; choose another --out.")
    if _is_mount(output.path):
        raise NekoLeanError(
            f"{output.path} is a mount point, which no finished folder can take the place of: choose a folder in it, "
            f"such as --out {output.path / 'out'}."
        )
    longest = os.pathconf(parent, "PC_NAME_MAX")
    own = max(_bytes(path.name) for path in (*temporary, output.lock)) - _bytes(output.path.name)
    if _bytes(output.path.name) + own > longest:
        raise NekoLeanError(
            f"{output.path.name} is a name of {_bytes(output.path.name)} bytes: {longest - own} are possible here, as "
            f"neko-lean lengthens it for its own files next to it; choose a shorter --out."
        )
    limit = os.pathconf(parent, "PC_PATH_MAX")
    if _bytes(str(output.path)) + _DEEPEST > limit:
        raise NekoLeanError(
            f"{output.path.name} would lie at a path of {_bytes(str(output.path))} bytes: {limit - _DEEPEST} are "
            f"possible here; choose a shorter --out."
        )


def _bytes(name: str) -> int:
    return len(os.fsencode(name))


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _is_mount(path: Path) -> bool:
    """Whether something is mounted at a path, also from the same file system (a bind mount)."""
    if os.path.ismount(path):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    # Spaces and the like in the fifth field, the mount point, are written as \040.
    points = {line.split()[4] for line in lines if len(line.split()) > 4}
    escaped = os.fsencode(path)
    for character in (b"\\", b" ", b"\t", b"\n"):
        escaped = escaped.replace(character, b"\\%03o" % ord(character))
    return escaped in points


def _refuse_inputs(output: Output, inputs: Iterable[Source | None]) -> None:
    """Raise NekoLeanError when an input is, or lies in, what the run would replace or clear.

    Folders are compared by device and inode, so that no spelling of a path hides one.
    """
    doomed = {key: path for path in (output.path, output.work, output.old) if (key := _key(path)) is not None}
    for source in inputs:
        if source is None or not doomed:
            continue
        for real in _real_paths(Path(source)):
            above = next((doomed[key] for path in (real, *real.parents) if (key := _key(path)) in doomed), None)
            if above is not None:
                relation = "is" if _key(real) == _key(above) else "holds"
                raise NekoLeanError(
                    f"{above} {relation} an input of this run ({source}), which the output would replace: choose "
                    f"another --out."
                )


def _key(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _real_paths(source: Path) -> Iterator[Path]:
    """Where an input lies, and where the links directly in it lead."""
    try:
        if not source.exists():
            return
        yield source.resolve()
        if source.is_dir():
            with os.scandir(source) as entries:
                yield from (Path(entry.path).resolve() for entry in entries if entry.is_symlink())
    except (OSError, ValueError, RuntimeError):
        return
