"""The one error that users see: a sentence that names the thing and the fix, exit code 2, no traceback."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from difflib import get_close_matches


class NekoLeanError(Exception):
    """Something the user can mend. Its text is one sentence and is all that the command line prints."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class NonFiniteError(Exception):
    """A loss or a gradient is no number."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. `number` is the signal's; `kept` says what lies on disk to go on from, if anything does.

    It is a KeyboardInterrupt, so that no `except Exception` on its way takes it for a fault.
    """

    def __init__(self, number: int, when: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.number = number
        self.kept: str | None = None


class PartialStepError(Exception):
    """The memory ran out when some weights had been stepped and others had not."""


class CacheError(NekoLeanError):
    """The cache is damaged, unreadable, or was made from something else than what it is used with."""


class UnpublishedError(NekoLeanError):
    """The result is complete but not in its place. Its sentence says where it is; nothing may clear that away."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: '; did you mean ...?' for the closest known one, or else '; choose from ...'."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(names)}."
