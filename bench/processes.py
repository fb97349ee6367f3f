"""Child processes for kill.py and two_processes.py, which are stopped or killed at random moments.

A child is forked from a process that has already imported everything, so starting one takes milliseconds. Its output
and its outcome are written to files. Needs Linux or macOS.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A child cannot use CUDA once its parent has, and bitsandbytes does so when it is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from neko_lean.errors import NekoLeanError

# Audit events of the interpreter for operations on files and folders; each is raised before the operation.
EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.listdir",
    "os.scandir",
    "fcntl.flock",
}
GRACE = 5.0  # seconds that the other ranks have to end by themselves after one has died


def forked(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run `work` in a child, kill it after `kill_after` seconds if given, and return the child's wait status."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


@dataclass(frozen=True)
class Moment:
    """A moment in the life of a child: after some seconds, or before its nth operation on the files of its output."""

    seconds: float | None = None
    operation: int | None = None

    @classmethod
    def drawn(cls, rng: random.Random, seconds: float, operations: int) -> Moment:
        """A random moment of a run that takes `seconds` and makes `operations` file operations."""
        if rng.random() < 0.5:
            return cls(seconds=rng.uniform(0, 1.1 * seconds))
        return cls(operation=rng.randint(1, max(1, operations)))


@dataclass
class Outcome:
    """How a child ended: 'ok' with what it returned, 'refused' with a sentence, 'crashed', or 'killed'."""

    ended: str
    value: Any = None
    sentence: str = ""
    operations: int = 0
    printed: str = ""


@dataclass
class Child:
    """A child process: what it does, and when it is stopped or killed."""

    work: Callable[[], Any]
    log: Path  # a file that does not exist yet
    watched: str = ""  # part of the path of every file whose operations count
    start: float = 0.0
    kill: Moment | None = None
    stop: Moment | None = None
    stopped_for: float = 0.0  # seconds; infinite: until all others have ended
    environment: Mapping[str, str] = field(default_factory=dict)
    pid: int = 0
    began: float = 0.0
    stopped_at: float | None = None
    outcome: Outcome | None = None

    def fork(self) -> None:
        """Start the child."""
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run()

    def _run(self) -> None:
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(self.environment)
        torch.set_num_threads(1)
        count = _count_operations(self.watched, {"kill": self.kill, "stop": self.stop})
        code, result = 0, {}
        try:
            result = {"ended": "ok", "value": self.work()}
        except NekoLeanError as error:
            code, result = 2, {"ended": "refused", "sentence": str(error)}
        except BaseException as error:
            traceback.print_exc()
            code, result = 1, {"ended": "crashed", "sentence": repr(error)}
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            self._result().write_text(json.dumps({**result, "operations": count[0]}, default=str))
            os._exit(code)

    def _result(self) -> Path:
        return self.log.with_name(self.log.name + ".json")

    def tend(self, elapsed: float, others_ended: bool) -> None:
        """Start, stop, continue or kill the child if that is due, and check whether it has ended or stopped."""
        since = time.monotonic() - self.began
        if not self.pid:
            if elapsed >= self.start:
                self.fork()
            return
        if self.kill and self.kill.seconds is not None and since >= self.kill.seconds:
            os.kill(self.pid, signal.SIGKILL)
        elif self.stop and self.stop.seconds is not None and since >= self.stop.seconds and self.stopped_at is None:
            os.kill(self.pid, signal.SIGSTOP)
        changed, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        if changed and os.WIFSTOPPED(status):
            self.stopped_at = time.monotonic()
        elif changed:
            self._end(status)
        elif self.stopped_at and (others_ended or time.monotonic() - self.stopped_at >= self.stopped_for):
            os.kill(self.pid, signal.SIGCONT)
            self.stopped_at = float("inf")  # it is continued only once

    def _end(self, status: int) -> None:
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        result = self._result()
        if killed:
            self.outcome = Outcome("killed")
        elif result.exists():
            self.outcome = Outcome(**json.loads(result.read_text()))
        else:
            self.outcome = Outcome("crashed", sentence=f"wait status {status}")
        self.outcome.printed = self.log.read_text(errors="replace") if self.log.exists() else ""


def run_all(children: Sequence[Child]) -> list[Outcome]:
    """Run children at the same time, each from its own start time."""
    start = time.monotonic()
    while any(child.outcome is None for child in children):
        for child in children:
            if child.outcome is None:
                others = [other for other in children if other is not child]
                child.tend(time.monotonic() - start, bool(others) and all(other.outcome for other in others))
        time.sleep(0.001)
    return [child.outcome for child in children if child.outcome]


def run_ranks(children: Sequence[Child]) -> list[Outcome]:
    """Run children as the ranks of one command. Like torchrun, kill all of them after one has died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank, child in enumerate(children):
        child.environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(children)),
            "LOCAL_WORLD_SIZE": str(len(children)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "bench",
        }
    start, dead = time.monotonic(), None
    while any(child.outcome is None for child in children):
        for child in children:
            if child.outcome is None:
                child.tend(time.monotonic() - start, False)
            if child.outcome is None and dead and time.monotonic() - dead > GRACE:
                os.kill(child.pid, signal.SIGKILL)
        if dead is None and any(child.outcome and child.outcome.ended != "ok" for child in children):
            dead = time.monotonic()
        time.sleep(0.001)
    return [child.outcome for child in children if child.outcome]


def _count_operations(watched: str, due: Mapping[str, Moment | None]) -> list[int]:
    """Count this process's file operations from now on, and stop or kill it before the operations named in `due`."""
    count = [0]
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
    numbers = {moment.operation: signals[name] for name, moment in due.items() if moment and moment.operation}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and (event == "fcntl.flock" or any(watched in str(argument) for argument in arguments[:2])):
            count[0] += 1
            if count[0] in numbers:
                os.kill(os.getpid(), numbers[count[0]])

    if watched:
        sys.addaudithook(hook)
    return count
