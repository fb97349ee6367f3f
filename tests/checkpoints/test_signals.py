"""When signals are deferred, and where handlers are installed."""

import os
import signal
import threading

import pytest

import neko_lean
from neko_lean.checkpoints import signals


@pytest.fixture
def default_sigint():
    """SIGINT as in a program that a terminal runs; a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
def test_signals_are_deferred_only_on_request_and_only_in_the_main_thread():
    with signals.handle_signals() as handled:
        with handled.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert handled.received == signal.SIGINT
        handled.received = None
        with pytest.raises(neko_lean.Interrupted, match="SIGTERM at once"):
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    seen = []

    def elsewhere():
        with signals.handle_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shells do for background processes
    with signals.handle_signals():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
