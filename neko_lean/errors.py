"""The one error that users see: a sentence that names the thing and the fix, exit code 2, no traceback."""

from __future__ import annotations


class NekoLeanError(Exception):
    """Something the user can mend. Its text is one sentence and is all that the command line prints."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
