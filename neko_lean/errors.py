"""The exceptions of neko-lean. A NekoLeanError is for users: one sentence, exit code 2, and no traceback."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class NekoLeanError(Exception):
    """An error that the user can fix.

    Its message is one sentence that names what is wrong and how to fix it. The command line prints nothing else.
    """


class CacheError(NekoLeanError):
    """A teacher cache is damaged or unreadable, or does not belong to the model or the data it is used with."""


class UnpublishedError(NekoLeanError):
    """A result is complete but could not be moved to its destination.

    The message says where the result is. No cleanup may remove it.
    """


class NonFiniteError(Exception):
    """A loss or a gradient is NaN or infinite."""


class PartialStepError(Exception):
    """The GPU ran out of memory after an optimizer step had updated some weights but not all."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run.

    It derives from KeyboardInterrupt, so that no `except Exception` handles it as an ordinary error.

    Attributes:
        number: The signal's number.
        saved_state: What was saved for `--resume`, as a clause for the message, or None if nothing was.
    """

    def __init__(self, number: int, when: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.number = number
        self.saved_state: str | None = None


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the exception's type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown name.

    Returns:
        "; did you mean 'lr'?" with the most similar of `names`, or "; choose from a, b." if none is similar.
    """
    names = list(names)
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; choose from {', '.join(names)}."
