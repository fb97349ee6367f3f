"""Terminal output: no text from a file can control the terminal, whatever it contains and wherever it is printed."""

import fcntl
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from typer.testing import CliRunner

import neko_lean
from neko_lean.cli import app
from neko_lean.cli.common import _print_error
from neko_lean.jsonio import write_jsonl
from neko_lean.terminal import log_line, print_json, print_lines, print_table, printable, progress_bar
from tests.helpers import resign
from tests.reporting.made import full_scores, make_generations, write_scores

# Sets a title and colors, returns the carriage, rings the bell, and contains a C1 control, a right-to-left override, a
# zero-width space, a lone surrogate, NUL, rich markup and an emoji code.
HOSTILE = "a\x1b]0;t\x07\x1b[31m\rb\x08\x9b1m\u202e\u200b\ud800\x00[red]x[/] [link=http://x]y[/link] [/] :smile:"
ESCAPED = printable(HOSTILE)
# As Python reads a file name that is not UTF-8.
HOSTILE_PATH = HOSTILE.replace("\x00", "").replace("/", "|").replace("\ud800", "\udcff")


def control_characters(text):
    """The characters of an output that could control a terminal."""
    return [char for char in text if not char.isprintable() and char != "\n"]


def call(*args):
    """Run a command and check that its output is free of control characters and tracebacks."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert not control_characters(result.output), (args, result.output)
    assert "Traceback" not in result.output
    return result


@given(st.text(st.characters(codec=None), max_size=40))
def test_every_character_is_printed_as_itself_or_as_an_escape(text):
    escaped = printable(text)
    assert escaped.isprintable() and printable(escaped) == escaped
    assert "".join(char for char in text if char.isprintable()) == text or escaped != text
    assert json.loads(json.dumps(escaped)) == escaped and escaped.encode().decode() == escaped


def test_escapes_show_which_character_was_replaced():
    assert "\\x1b]0;t\\x07" in ESCAPED and "\\u202e\\u200b\\ud800\\x00[red]x[/]" in ESCAPED and "\\x9b" in ESCAPED
    assert printable("Où ? 東京 — naïve") == "Où ? 東京 — naïve"


def test_lines_tables_progress_and_errors_are_escaped(capsys):
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row("[/]")
    log_line(HOSTILE)
    print_lines(HOSTILE, "second")
    print_table(table)
    _print_error(HOSTILE)
    with progress_bar(HOSTILE, 2, "rows") as bar:
        bar._last_log = float("-inf")
        bar.advance(note=HOSTILE)
    out, err = capsys.readouterr()
    assert not control_characters(out) and not control_characters(err)
    assert out.startswith(f"{ESCAPED}\nsecond\n") and "[/]" in out and "[red]" in out
    assert f"\nerror: {ESCAPED}\n{ESCAPED}: 1/2 rows" in err and err.count("\n") == 3


def test_a_progress_bar_in_a_terminal_is_escaped(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(HOSTILE, 2, "rows") as bar:
        bar.advance(note=HOSTILE)
    text = terminal.getvalue()
    assert ESCAPED in text and not {"\x07", "\x08", "\x9b", "\u202e", "\u200b", "\x00", "\x1b]"} & set(text)
    assert "\x1b]" not in text


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_output_is_encodable_in_every_encoding(monkeypatch, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    table = Table(title="東京")
    table.add_column("→")
    table.add_row("\ud800")
    print_lines("東京 \ud800")
    print_table(table)
    print_json({"text": f"{HOSTILE}東\x7f\x85\u2028", "é": 1})
    lines = stdout.buffer.getvalue().decode(encoding).splitlines()
    assert lines[0] == ("東京" if encoding == "utf-8" else "\\u6771\\u4eac") + " \\ud800"
    assert lines[-1].isascii() and lines[-1].isprintable()
    assert json.loads(lines[-1]) == {"text": f"{HOSTILE}東\x7f\x85\u2028", "é": 1}


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", HOSTILE_PATH),
        ("plan", HOSTILE_PATH),
        ("recipes", HOSTILE_PATH),
        ("report", HOSTILE_PATH),
        ("score", HOSTILE_PATH, "--data", HOSTILE_PATH, "--out", HOSTILE_PATH),
        ("unlearn", HOSTILE_PATH, "--forget", HOSTILE_PATH, "--retain", HOSTILE_PATH, "--out", HOSTILE_PATH),
        ("memorize", HOSTILE_PATH, "--data", HOSTILE_PATH, "--out", HOSTILE_PATH),
        ("cache-teacher", HOSTILE_PATH, HOSTILE_PATH, "--out", HOSTILE_PATH),
        ("demo", "--data", HOSTILE_PATH),
        ("demo", "--device", HOSTILE_PATH),
        (HOSTILE_PATH,),
        ("demo", f"--{HOSTILE_PATH}"),
        ("demo", "--seed", HOSTILE_PATH),
        ("plan", "--gpu", HOSTILE_PATH, "x"),
        ("plan", "x", "--set", HOSTILE_PATH),
        ("plan", "x", "--recipe", HOSTILE_PATH),
        ("demo", "--split", HOSTILE_PATH),
        ("score", "x", "--data", "y", "--out", "z", "--attack", HOSTILE_PATH),
        ("score", "x", "--data", "y", "--out", "z", HOSTILE_PATH),
    ],
)
def test_hostile_arguments_are_refused(arguments):
    assert call(*arguments).exit_code == 2


def test_inspect_escapes_a_hostile_manifest(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    resign(copy, model=HOSTILE.replace("\ud800", ""))
    result = call("inspect", copy)
    assert result.exit_code == 0 and "\\x1b" in result.output
    assert call("inspect", copy, "--json").exit_code == 0


def test_hostile_model_and_recipe_names_are_escaped(model, tmp_path):
    named = shutil.copytree(model, tmp_path / "m\x1b[31m[red]x[|]")
    result = call("plan", named)
    assert result.exit_code == 0 and "[red]x[|]" in result.output
    text = (Path(neko_lean.__file__).parent / "recipe" / "neko.toml").read_text()
    (tmp_path / "r.toml").write_text(text.replace('summary = "', 'summary = "\\u001b[/]\\u202e'))
    assert "[/]" in call("recipes", tmp_path / "r.toml").output


def test_errors_escape_hostile_ids_tasks_and_columns(model, tmp_path):
    row = {"id": "a-qa0", "input": "q", "output": "a", "task": "Task1"}
    name = HOSTILE.replace("\ud800", "")
    for number, bad_row in enumerate(
        ({**row, "id": name}, {**row, "task": name}, {name: 1}, {**row, "id": f"{name}-qa0"})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for split in ("forget", "retain"):
            write_jsonl(folder / f"{split}.jsonl", [bad_row, bad_row])
        assert call("score", model, "--data", folder, "--out", tmp_path / "out").exit_code == 2


def test_report_escapes_hostile_scores(tmp_path):
    scores = {**full_scores(HOSTILE, 0.5), "verdict": [HOSTILE]}
    folder = write_scores(tmp_path / "s\x1b[31m", scores, make_generations(HOSTILE))
    assert call("report", folder, "--out", tmp_path / "r.html", "--title", HOSTILE.replace("\x00", "")).exit_code == 0


def test_the_score_table_escapes_generated_texts(capsys):
    from neko_lean.scoring.table import score_table

    scores = {**full_scores(HOSTILE, 0.5), "missing_cells": [], "verdict": [HOSTILE]}
    print_table(score_table({HOSTILE: scores}))
    out = capsys.readouterr().out
    assert not control_characters(out) and "[red]" in out


# Runs a command that waits in its third step for a signal, and creates a marker file once it does.
SCRIPT = """
import os, signal, sys, time
from neko_lean.cli import main
from neko_lean.training import loop
signal.signal(signal.SIGHUP, signal.SIG_DFL)
marker, original = sys.argv.pop(1), loop.Loop._step
def step(self, *rest):
    if self.state.step == 2:
        open(marker, "w").close()
        while self.signals.received is None:
            time.sleep(0.01)
    return original(self, *rest)
loop.Loop._step = step
main()
"""


@pytest.mark.slow
def test_a_run_saves_when_its_terminal_is_closed(world, tmp_path):
    """With a real terminal and progress bars: the kernel sends SIGHUP, and every later write to the terminal fails."""
    controller, terminal = pty.openpty()
    command = ["memorize", world / "base", "--data", world, "--out", tmp_path / "m", "--max-steps", 4]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path / "marker", *map(str, command)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    os.set_blocking(controller, False)
    while not (tmp_path / "marker").exists() and process.poll() is None:
        try:
            os.read(controller, 10**6)
        except BlockingIOError:
            time.sleep(0.01)
    assert process.poll() is None
    os.close(controller)
    assert process.wait() == 129
    assert (tmp_path / ".m.saved").is_dir() and not (tmp_path / "m").exists()
