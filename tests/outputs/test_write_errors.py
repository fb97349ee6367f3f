"""Every error of the operating system becomes one sentence with the path and the reason."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from neko_lean.errors import NekoLeanError
from neko_lean.outputs.write_errors import explained_write_errors, os_error_sentence

CODES = [getattr(errno, name) for name in dir(errno) if name.startswith("E") and name != "EPIPE"]


@pytest.mark.parametrize("code", sorted(set(CODES)))
def test_every_errno_becomes_a_sentence(code):
    output = Path("/data/out")
    with pytest.raises(NekoLeanError) as caught, explained_write_errors(output):
        raise OSError(code, os.strerror(code), "/data/.out.partial/plan.json")
    message = str(caught.value)
    assert "/data/out" in message and message.endswith(".") and "\n" not in message
    if code not in (errno.ENOSPC, errno.EDQUOT):
        assert os.strerror(code) in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (SafetensorError("I/O error: Input/output error (os error 5)"), "Input/output error"),
        (SafetensorError("I/O error: File too large (os error 27)"), "File too large"),
        (FileNotFoundError(2, "No such file or directory", b"/gone/x"), "/gone/x: No such file"),
        (OSError("a library's own words\nwith advice"), "a library's own words."),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_errors_wrapped_by_libraries_keep_their_reason(error, words):
    sentence = os_error_sentence(error, Path("/data/out"))
    assert words in sentence and "\n" not in sentence
    with pytest.raises(NekoLeanError), explained_write_errors(Path("/data/out")):
        raise error


def test_other_errors_are_not_converted():
    for error in (ValueError("x"), KeyError("x"), RuntimeError("os error")):
        assert os_error_sentence(error) is None
        with pytest.raises(type(error)), explained_write_errors(Path("out")):
            raise error
    with pytest.raises(NekoLeanError, match="mine"), explained_write_errors(Path("out")):
        raise NekoLeanError("mine")
    with pytest.raises(KeyboardInterrupt), explained_write_errors(Path("out")):
        raise KeyboardInterrupt
