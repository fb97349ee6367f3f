"""What is written to the terminal: nothing that a file says can act on it, whatever it is and wherever it stands."""

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
from tests.report.made import full_scores, make_generations, write_scores

# A title, colours, a line begun anew, a bell, a C1 control, a line turned round, an unseen sign, half a pair, markup.
HOSTILE = "a\x1b]0;t\x07\x1b[31m\rb\x08\x9b1m\u202e\u200b\ud800\x00[red]x[/] [link=http://x]y[/link] [/] :smile:"
SHOWN = printable(HOSTILE)


def acts(text):
    """Whether some character of what was written does more than stand there; colours of our own tables aside."""
    return [sign for sign in text if not sign.isprintable() and sign != "\n"]


def call(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert not acts(result.output), (args, result.output)
    assert "Traceback" not in result.output
    return result


@given(st.text(st.characters(codec=None), max_size=40))
def test_every_character_is_shown_as_itself_or_as_an_escape(text):
    found = printable(text)
    assert found.isprintable() and printable(found) == found
    assert "".join(sign for sign in text if sign.isprintable()) == text or found != text
    assert json.loads(json.dumps(found)) == found and found.encode().decode() == found


def test_the_hostile_text_loses_nothing():
    assert "\\x1b]0;t\\x07" in SHOWN and "\\u202e\\u200b\\ud800\\x00[red]x[/]" in SHOWN and "\\x9b" in SHOWN
    assert printable("Où ? 東京 — naïve") == "Où ? 東京 — naïve"


def test_lines_tables_bars_and_errors(capsys):
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row("[/]")
    log_line(HOSTILE)
    print_lines(HOSTILE, "second")
    print_table(table)
    _print_error(HOSTILE)
    with progress_bar(HOSTILE, 2, "rows") as one:
        one._said = float("-inf")
        one.advance(note=HOSTILE)
    found = capsys.readouterr()
    assert not acts(found.out) and not acts(found.err)
    assert found.out.startswith(f"{SHOWN}\nsecond\n") and "[/]" in found.out and "[red]" in found.out
    assert f"\nerror: {SHOWN}\n{SHOWN}: 1/2 rows" in found.err and found.err.count("\n") == 3


def test_a_bar_in_a_terminal(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(HOSTILE, 2, "rows") as one:
        one.advance(note=HOSTILE)
    text = screen.getvalue()
    assert SHOWN in text and not {"\x07", "\x08", "\x9b", "\u202e", "\u200b", "\x00", "\x1b]"} & set(text)
    assert "\x1b]" not in text


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_every_stdout_can_encode_it(monkeypatch, encoding):
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


PATH = HOSTILE.replace("\x00", "").replace("/", "|").replace("\ud800", "\udcff")  # as Python reads a byte of no text


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", PATH), ("plan", PATH), ("recipes", PATH), ("report", PATH),
        ("score", PATH, "--data", PATH, "--out", PATH),
        ("unlearn", PATH, "--forget", PATH, "--retain", PATH, "--out", PATH),
        ("memorize", PATH, "--data", PATH, "--out", PATH),
        ("cache-teacher", PATH, PATH, "--out", PATH), ("demo", "--data", PATH), ("demo", "--device", PATH), (PATH,),
        ("demo", f"--{PATH}"), ("demo", "--seed", PATH), ("plan", "--gpu", PATH, "x"), ("plan", "x", "--set", PATH),
        ("plan", "x", "--recipe", PATH), ("demo", "--split", PATH),
        ("score", "x", "--data", "y", "--out", "z", "--attack", PATH),
        ("score", "x", "--data", "y", "--out", "z", PATH),
    ],
)  # fmt: skip
def test_arguments(words):
    assert call(*words).exit_code == 2


def test_inspect_of_a_cache_that_says_what_it_likes(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    resign(copy, model=HOSTILE.replace("\ud800", ""))
    result = call("inspect", copy)
    assert result.exit_code == 0 and "\\x1b" in result.output
    assert call("inspect", copy, "--json").exit_code == 0


def test_a_model_and_a_recipe_of_any_name(model, tmp_path):
    named = shutil.copytree(model, tmp_path / "m\x1b[31m[red]x[|]")
    result = call("plan", named)
    assert result.exit_code == 0 and "[red]x[|]" in result.output
    text = (Path(neko_lean.__file__).parent / "recipes" / "neko.toml").read_text()
    (tmp_path / "r.toml").write_text(text.replace('summary = "', 'summary = "\\u001b[/]\\u202e'))
    assert "[/]" in call("recipes", tmp_path / "r.toml").output


def test_rows_columns_and_tasks(model, tmp_path):
    good = {"id": "a-qa0", "input": "q", "output": "a", "task": "Task1"}
    name = HOSTILE.replace("\ud800", "")
    for number, row in enumerate(
        ({**good, "id": name}, {**good, "task": name}, {name: 1}, {**good, "id": f"{name}-qa0"})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for split in ("forget", "retain"):
            write_jsonl(folder / f"{split}.jsonl", [row, row])
        assert call("score", model, "--data", folder, "--out", tmp_path / "out").exit_code == 2


def test_a_report_of_hostile_scores(tmp_path):
    scores = {**full_scores(HOSTILE, 0.5), "verdict": [HOSTILE]}
    folder = write_scores(tmp_path / "s\x1b[31m", scores, make_generations(HOSTILE))
    assert call("report", folder, "--out", tmp_path / "r.html", "--title", HOSTILE.replace("\x00", "")).exit_code == 0


def test_the_table_of_a_score_shows_generated_texts_as_text(capsys):
    from neko_lean.scoring.table import score_table

    scores = {**full_scores(HOSTILE, 0.5), "missing_cells": [], "verdict": [HOSTILE]}
    print_table(score_table({HOSTILE: scores}))
    found = capsys.readouterr().out
    assert not acts(found) and "[red]" in found


SCRIPT = """
import os, signal, sys, time
from neko_lean import loop
from neko_lean.cli import main
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


def test_a_run_whose_terminal_is_closed_saves(world, tmp_path):
    """A real terminal, drawn bars and all: the kernel sends SIGHUP, and every later write to it fails."""
    ours, theirs = pty.openpty()
    words = ["memorize", world / "base", "--data", world, "--out", tmp_path / "m", "--max-steps", 4]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path / "marker", *map(str, words)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    while not (tmp_path / "marker").exists() and process.poll() is None:
        try:
            os.read(ours, 10**6)
        except BlockingIOError:
            time.sleep(0.01)
    assert process.poll() is None
    os.close(ours)
    assert process.wait() == 129
    assert (tmp_path / ".m.saved").is_dir() and not (tmp_path / "m").exists()
