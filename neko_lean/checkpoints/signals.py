"""Ctrl-C, SIGTERM and SIGHUP in a long run: while it trains the first one waits for the step's end, a second one does
not.

When a terminal closes, its shell and the kernel may each send a SIGHUP, so that a second one of those changes nothing.

Handlers are installed in the main thread only, where Python lets one, and restored afterwards. A signal that the
process was told to ignore stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from neko_lean.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """What arrived: `received` is the signal that waits for the end of the step."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._patient = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it the first signal is only noted down. Outside, and from the second on, a signal raises at once."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def arrive(self, number: int, frame: FrameType | None = None) -> None:
        """The handler."""
        if self._patient and self.received is not None and number == signal.SIGHUP:
            return
        if not self._patient or self.received is not None:
            raise Interrupted(number, "at once")
        self.received = number
        # Not through sys.stderr: the handler may have interrupted a write to it. A terminal that hung up takes nothing.
        with suppress(OSError):
            os.write(2, b"finishing the step, then saving; once more stops at once\n")


@contextmanager
def handle_signals() -> Iterator[Signals]:
    """Signals, with handlers for SIGINT, SIGTERM and SIGHUP while it lasts."""
    signals = Signals()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: signal.getsignal(one) for one in SIGNALS}
        # None is a handler that is not Python's: it could not be put back.
        before = {one: handler for one, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for one in before:
        signal.signal(one, signals.arrive)
    try:
        yield signals
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
