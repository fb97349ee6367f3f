"""The operating system's errors as one sentence: what could not be written, why, and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neko_lean.errors import NekoLeanError, first_line

_REMEDIES = {
    errno.EACCES: "choose another --out, or ask for the right to write there",
    errno.EPERM: "choose another --out, or ask for the right to write there",
    errno.EROFS: "choose an --out on a disk that can be written to",
    errno.ENAMETOOLONG: "choose a shorter --out",
    errno.EFBIG: "choose an --out on a file system that holds files of this size",
    errno.EIO: "check the disk, or choose an --out on another one",
    errno.ENOENT: "something removed it meanwhile; run again",
    errno.ENOTDIR: "a part of the path is a file; choose another --out",
    errno.EISDIR: "it is a folder; choose another name",
    errno.EBUSY: "something holds it (a mount point, for one); choose another --out",
    errno.ELOOP: "a link is in the way; remove it or choose another --out",
    errno.EXDEV: "choose an --out that lies on one file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the system has too many files open; close some programs",
    errno.ESTALE: "the network file system lost it; mount it again",
}


@contextmanager
def explained_write_errors(where: Path) -> Iterator[None]:
    """Turn every error of the operating system into a NekoLeanError about `where`, the output being written."""
    try:
        yield
    except NekoLeanError:
        raise
    except Exception as error:
        sentence = os_error_sentence(error, where)
        if sentence is None:
            raise
        raise NekoLeanError(sentence) from error


def os_error_sentence(error: Exception, where: Path | None = None) -> str | None:
    """The sentence for an error of the operating system, also one that a library has wrapped; None for any other.

    Args:
        error: OSError and its kinds, or what safetensors and pyarrow make of one.
        where: the output being written; without it the sentence names only the file of the error itself.
    """
    code = _error_number(error)
    if code is None:
        return first_line(error) + "." if isinstance(error, OSError) else None
    file = getattr(error, "filename", None)
    file = Path(os.fsdecode(file)) if isinstance(file, str | bytes) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        what = "No space left on the disk" if code == errno.ENOSPC else "The disk quota is used up"
        return f"{what} while writing {where or file}: free some and run again."
    reason, remedy = os.strerror(code), _REMEDIES.get(code, "mend that and run again")
    if where is None or file == where:
        return f"{file or 'a file'}: {reason}; {remedy}."
    about = f" ({file}: {reason})" if file is not None else f" ({reason})"
    return f"{where} cannot be written to{about}: {remedy}."


def _error_number(error: Exception) -> int | None:
    """The errno of an error. safetensors keeps only Rust's text of it, which ends in '(os error 28)'."""
    code = getattr(error, "errno", None)
    if isinstance(error, OSError) and code is not None:
        return int(code)
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found:
        return int(found[1])
    return errno.ENOSPC if "No space left" in str(error) else None
