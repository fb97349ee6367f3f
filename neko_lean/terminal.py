"""All that is written to the terminal: lines, tables, and progress (a bar in a terminal, a line now and then in a log).

Names, texts and errors come from files and from other libraries. Their control characters are shown as escapes, so that
nothing that a file says can move the cursor, change colours or reorder a line, and square brackets are not markup.
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

from neko_lean.distributed import is_main_process

LOG_SECONDS = 10.0


def printable(text: str) -> str:
    """`text` with an escape such as `\\x1b` in the place of every character that is not shown as itself: control
    characters and line ends, invisible signs and those that change a line's direction, and half surrogate pairs."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


class _Stream:
    """stdout or stderr as it is now, which a bar may replace later: what it cannot encode is written as escapes.

    Nobody reads stderr any more once its terminal has hung up. Then the run must go on, if only to save: what would be
    written there is dropped.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stream = cast("TextIO", getattr(sys, name))

    @property
    def encoding(self) -> str:
        """What the stream encodes text as."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The number of the file it writes to."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write `text` in one piece."""
        encodable = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        with self._dropped():
            self._stream.write(encodable)
        return len(text)

    def flush(self) -> None:
        """Hand over what was written."""
        with self._dropped():
            self._stream.flush()

    @contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if self._name != "stderr":
                raise
            # What is in its buffer would fail again when Python ends, which would change the exit code.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


class _Terminal(Console):
    """A rich console to which texts are texts: no markup, no emoji codes, control characters as escapes."""

    def __init__(self, stream: str) -> None:
        super().__init__(file=cast("IO[str]", _Stream(stream)), markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every string in a table."""
        return super().render_str(printable(text), **options)


def print_lines(*lines: str) -> None:
    """Lines on stdout: a result for the person who runs this."""
    _write_lines(_Stream("stdout"), *lines)


def print_table(table: RenderableType) -> None:
    """A table, or several things that rich draws, on stdout."""
    _Terminal("stdout").print(table)


def print_json(value: Any) -> None:
    """One JSON object on stdout, in ASCII, so that every stdout can encode it and no terminal acts on it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    _write_lines(_Stream("stdout"), text.replace("\x7f", "\\u007f"))


def print_to_stderr(*lines: str) -> None:
    """Lines on stderr, in one piece, from any rank: other ranks write at the same time."""
    _write_lines(_Stream("stderr"), *lines)


def _write_lines(stream: _Stream, *lines: str) -> None:
    stream.write("".join(f"{printable(line)}\n" for line in lines))
    stream.flush()


class _Rate(ProgressColumn):
    """Units a second, in the task's own unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {task.fields['unit']}/s", style="progress.data.speed")


class ProgressBar:
    """Counts units done of a known total."""

    def __init__(self, label: str, total: int, unit: str, progress: Progress | None, log: bool, done: int = 0) -> None:
        self.label, self.total, self.unit, self.done, self._before = label, total, unit, done, done
        self._progress, self._log = progress, log
        self._start = self._said = time.monotonic()
        self._task = progress.add_task(printable(label), total=total, unit=unit, completed=done) if progress else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` units as done; `note` stands behind the label from now on."""
        self.done += count
        if self._progress is not None and self._task is not None:
            label = printable(f"{self.label} {note}" if note else self.label)
            self._progress.update(self._task, advance=count, description=label)
        now = time.monotonic()
        if self._log and now - self._said >= LOG_SECONDS:
            self._said = now
            rate = (self.done - self._before) / (now - self._start)
            left = (self.total - self.done) / rate if rate else float("inf")
            line = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {left:.0f} s left"
            print_to_stderr(f"{line} {note}".rstrip())


@contextmanager
def progress_bar(label: str, total: int, unit: str, quiet: bool = False, done: int = 0) -> Iterator[ProgressBar]:
    """A Bar that shows itself on stderr: drawn in a terminal, logged every LOG_SECONDS elsewhere, silent if quiet.

    `done` units were done before: they count as done, but not for the rate."""
    if quiet or not is_main_process() or not sys.stderr.isatty():
        yield ProgressBar(label, total, unit, None, log=not quiet and is_main_process(), done=done)
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


def log_line(text: str, quiet: bool = False) -> None:
    """One line for the person who runs this, on stderr; of the ranks the first one talks."""
    if not quiet and is_main_process():
        print_to_stderr(text)
