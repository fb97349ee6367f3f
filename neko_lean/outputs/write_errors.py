"""Turn errors of the operating system into one sentence: what could not be written, why, and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neko_lean.errors import NekoLeanError, first_line

_REMEDIES = {
    errno.EACCES: "choose another --out, or get write permission for it",
    errno.EPERM: "choose another --out, or get write permission for it",
    errno.EROFS: "choose an --out on a writable disk",
    errno.ENAMETOOLONG: "choose a shorter --out",
    errno.EFBIG: "choose an --out on a file system that supports files of this size",
    errno.EIO: "check the disk, or choose an --out on another one",
    errno.ENOENT: "another process removed it during the run; run again",
    errno.ENOTDIR: "a part of the path is a file; choose another --out",
    errno.EISDIR: "it is a folder; choose another name",
    errno.EBUSY: "it is in use, for example as a mount point; choose another --out",
    errno.ELOOP: "the path contains a link; remove it or choose another --out",
    errno.EXDEV: "choose an --out whose folder is on a single file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the system has too many open files; close some programs",
    errno.ESTALE: "the network file system lost it; mount it again",
}


@contextmanager
def explained_write_errors(output: Path) -> Iterator[None]:
    """Convert every OSError in the block, also one that a library has wrapped, into a NekoLeanError about `output`."""
    try:
        yield
    except NekoLeanError:
        raise
    except Exception as error:
        sentence = os_error_sentence(error, output)
        if sentence is None:
            raise
        raise NekoLeanError(sentence) from error


def os_error_sentence(error: Exception, output: Path | None = None) -> str | None:
    """Describe an error of the operating system in one sentence.

    Args:
        error: an OSError, or the exception that safetensors or pyarrow raises for one.
        output: the output being written. Without it, the sentence names only the file that the error is about.

    Returns:
        The sentence, or None if `error` is not an error of the operating system.
    """
    code = _errno_of(error)
    if code is None:
        return first_line(error) + "." if isinstance(error, OSError) else None

    filename = getattr(error, "filename", None)
    file = Path(os.fsdecode(filename)) if isinstance(filename, str | bytes) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        problem = "No space left on the disk" if code == errno.ENOSPC else "The disk quota is used up"
        return f"{problem} while writing {output or file}: free some space and run again."

    reason, remedy = os.strerror(code), _REMEDIES.get(code, "fix this and run again")
    if output is None or file == output:
        return f"{file or 'a file'}: {reason}; {remedy}."
    details = reason if file is None else f"{file}: {reason}"
    return f"{output} cannot be written to ({details}): {remedy}."


def _errno_of(error: Exception) -> int | None:
    """The errno of an error. safetensors keeps only Rust's message, which ends in '(os error 28)'."""
    code = getattr(error, "errno", None)
    if isinstance(error, OSError) and code is not None:
        return int(code)
    match = re.search(r"\(os error (\d+)\)", str(error))
    if match:
        return int(match[1])
    return errno.ENOSPC if "No space left" in str(error) else None
