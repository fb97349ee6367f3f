"""Ctrl-C, SIGTERM and SIGHUP during a long run: the first signal waits for the end of the training step.

Handlers are installed only in the main thread, where Python allows it, and are restored afterwards. A signal that the
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
    """Signals that arrived. `received` is the one that waits for the end of the step, if any."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context the first signal is only recorded in `received`. Any other signal raises at once."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler.

        A closing terminal may cause two SIGHUPs, one from its shell and one from the kernel. A second SIGHUP is
        therefore ignored. Raises Interrupted unless the signal is deferred or ignored.
        """
        if self._deferring and self.received is not None and number == signal.SIGHUP:
            return
        if not self._deferring or self.received is not None:
            raise Interrupted(number, "at once")
        self.received = number
        # Not through sys.stderr, as the handler may have interrupted a write to it. After a hangup the write fails.
        with suppress(OSError):
            os.write(2, b"finishing the step, then saving; send another signal to stop at once\n")


@contextmanager
def handle_signals() -> Iterator[Signals]:
    """Handle SIGINT, SIGTERM and SIGHUP within this context."""
    signals = Signals()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        # A handler of None was not installed by Python and could not be restored.
        previous = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    for number in previous:
        signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
