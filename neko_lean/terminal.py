"""Terminal output: lines, tables, JSON, and progress (a bar in a terminal, occasional lines in a log).

Texts come from data files and other libraries. Control characters are printed as escapes and square brackets are not
markup, so that no text can move the cursor, change colors or reorder a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO, cast

from rich.console import Console, RenderableType
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

LOG_SECONDS = 10.0  # the time between two progress lines in a log

_start: float | None = None  # when `show_elapsed_time` was called, in seconds of time.monotonic


def printable(text: str) -> str:
    """Replace every non-printable character of `text` by an escape such as `\\x1b`.

    These are control characters, line breaks, invisible characters, characters that change the direction of a line, and
    lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def print_lines(*lines: str) -> None:
    """Print lines on stdout, for results."""
    _write_lines(_Stream("stdout"), *lines)


def print_table(table: RenderableType) -> None:
    """Print a table, or anything else that rich can render, on stdout."""
    _Terminal("stdout").print(table)


def print_json(value: Any) -> None:
    """Print a JSON object on stdout, in ASCII, which every stdout can encode."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    _write_lines(_Stream("stdout"), text.replace("\x7f", "\\u007f"))


def print_to_stderr(*lines: str) -> None:
    """Print lines on stderr, from any rank. They are written in one piece, since other ranks write at the same time."""
    _write_lines(_Stream("stderr"), *lines)


def log_line(text: str, quiet: bool = False) -> None:
    """Print a line on stderr, from rank 0 only and unless `quiet`."""
    if not quiet and _is_main_process():
        print_to_stderr(text if _start is None else f"[{time.monotonic() - _start:6.1f} s] {text}")


def show_elapsed_time(show: bool) -> None:
    """From now on, whether each line of `log_line` starts with the seconds since this call."""
    global _start
    _start = time.monotonic() if show else None


class ProgressBar:
    """Counts how many units of a known total are done."""

    def __init__(self, label: str, total: int, unit: str, progress: Progress | None, log: bool, done: int = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._done_before = done
        self._progress, self._log = progress, log
        self._start = self._last_log = time.monotonic()
        self._task = progress.add_task(printable(label), total=total, unit=unit, completed=done) if progress else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done and show `note` after the label."""
        self.done += count
        if self._progress is not None and self._task is not None:
            label = printable(f"{self.label} {note}" if note else self.label)
            self._progress.update(self._task, advance=count, description=label)

        now = time.monotonic()
        if self._log and now - self._last_log >= LOG_SECONDS:
            self._last_log = now
            rate = (self.done - self._done_before) / (now - self._start)
            seconds_left = (self.total - self.done) / rate if rate else float("inf")
            line = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {seconds_left:.0f} s left"
            print_to_stderr(f"{line} {note}".rstrip())


@contextmanager
def progress_bar(label: str, total: int, unit: str, quiet: bool = False, done: int = 0) -> Iterator[ProgressBar]:
    """Context manager for a ProgressBar on stderr: drawn in a terminal, logged every LOG_SECONDS elsewhere.

    Args:
        label: What is in progress.
        total: The number of units.
        unit: The plural name of a unit, such as "rows".
        quiet: Show nothing.
        done: The number of units that were done earlier. They do not count towards the rate.
    """
    show = not quiet and _is_main_process()
    if not show or not sys.stderr.isatty():
        yield ProgressBar(label, total, unit, None, log=show, done=done)
        return

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_Terminal("stderr"), transient=True) as progress:
        yield ProgressBar(label, total, unit, progress, log=False, done=done)


class _Stream:
    """The current stdout or stderr, which a progress bar may replace later.

    Characters that the stream cannot encode are written as escapes. Writes to stderr are dropped once its terminal is
    closed, since a run must continue then, at least until it has saved.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stream = cast("TextIO", getattr(sys, name))

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's file descriptor."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write `text` in one piece."""
        encodable = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        with self._ignore_closed_terminal():
            self._stream.write(encodable)
        return len(text)

    def flush(self) -> None:
        """Flush the stream's buffer."""
        with self._ignore_closed_terminal():
            self._stream.flush()

    @contextmanager
    def _ignore_closed_terminal(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if self._name != "stderr":
                raise
            # Redirect stderr to /dev/null: flushing its buffer at exit would fail again and change the exit code.
            with suppress(OSError, ValueError):
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, self._stream.fileno())
                os.close(devnull)


class _Terminal(Console):
    """A rich console that prints texts literally: no markup, no emoji codes, and control characters as escapes."""

    def __init__(self, stream: str) -> None:
        super().__init__(file=cast("IO[str]", _Stream(stream)), markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string in a table to rich text."""
        return super().render_str(printable(text), **options)


class _Rate(ProgressColumn):
    """A column with the units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {task.fields['unit']}/s", style="progress.data.speed")


def _is_main_process() -> bool:
    from neko_lean.distributed import is_main_process  # imports torch, which a usage error must not wait for

    return is_main_process()


def _write_lines(stream: _Stream, *lines: str) -> None:
    stream.write("".join(f"{printable(line)}\n" for line in lines))
    stream.flush()
