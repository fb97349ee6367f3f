"""Progress on stderr: a bar with rate and time left in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from neko_lean.ranks import leads

LOG_SECONDS = 10.0


class _Rate(ProgressColumn):
    """Units a second, in the task's own unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {task.fields['unit']}/s", style="progress.data.speed")


class Bar:
    """Counts units done of a known total."""

    def __init__(self, label: str, total: int, unit: str, progress: Progress | None, log: bool, done: int = 0) -> None:
        self.label, self.total, self.unit, self.done, self._before = label, total, unit, done, done
        self._progress, self._log = progress, log
        self._start = self._said = time.monotonic()
        self._task = progress.add_task(label, total=total, unit=unit, completed=done) if progress else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` units as done; `note` stands behind the label from now on."""
        self.done += count
        if self._progress is not None and self._task is not None:
            label = f"{self.label} {note}" if note else self.label
            self._progress.update(self._task, advance=count, description=label)
        now = time.monotonic()
        if self._log and now - self._said >= LOG_SECONDS:
            self._said = now
            rate = (self.done - self._before) / (now - self._start)
            left = (self.total - self.done) / rate if rate else float("inf")
            line = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {left:.0f} s left"
            print(f"{line} {note}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def bar(label: str, total: int, unit: str, quiet: bool = False, done: int = 0) -> Iterator[Bar]:
    """A Bar that shows itself on stderr: drawn in a terminal, logged every LOG_SECONDS elsewhere, silent if quiet.

    `done` units were done before: they count as done, but not for the rate."""
    if quiet or not leads() or not sys.stderr.isatty():
        yield Bar(label, total, unit, None, log=not quiet and leads(), done=done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(label, total, unit, progress, log=False, done=done)


def say(text: str, quiet: bool = False) -> None:
    """One line for the person who runs this, on stderr; of the ranks the first one talks."""
    if not quiet and leads():
        print(text, file=sys.stderr, flush=True)
