"""Help, versions and completion: fast, in named groups that fit a screen, and as plain text."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import neko_lean
from neko_lean.cli import app
from neko_lean.cli.help import COMMANDS
from neko_lean.options import MESSAGES, OTHER, PANELS

ROOT = Path(__file__).parents[2]


def help_of(*args, columns=100):
    result = CliRunner().invoke(app, [*args, "--help"], env={"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)})
    assert result.exit_code == 0, result.output
    return result.output


def groups_of(text):
    """The lines of each named group of a help text."""
    groups = {}
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            groups[line[:-1]] = current = [line]
        elif groups and line.strip():
            current.append(line)
    return groups


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [80, 100])
def test_every_group_of_options_fits_a_screen(command, columns):
    text = help_of(command, columns=columns)
    groups = groups_of(text)
    assert set(groups) <= {"Arguments", *PANELS} and MESSAGES in groups and OTHER not in groups
    assert max(map(len, text.splitlines())) <= columns
    assert max(map(len, groups.values())) <= (22 if columns == 100 else 30), groups


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_help_and_explained(command):
    # Rich markup and control characters would be interpreted or escaped; plain text needs neither.
    text = help_of(command)
    assert text.isascii() and "\x1b" not in text
    assert "-h, --help" in text and "--verbose" in text
    for option in re.findall(r"^  (--[\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^  {option}\b.*\n?.*  \S", text, re.MULTILINE), option


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_says_what_the_help_of_each_begins_with(command):
    first_paragraph = help_of(command).split("\n\n")[1]
    assert " ".join(first_paragraph.split()).startswith(COMMANDS[command])
    assert COMMANDS[command] in " ".join(help_of().split())


def test_short_help_and_no_arguments():
    runner = CliRunner()
    assert runner.invoke(app, ["-h"]).stdout == help_of(columns=80)
    nothing = runner.invoke(app, [])
    assert nothing.exit_code == 2 and "cache-teacher" in nothing.stderr and nothing.stdout == ""


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout == f"neko-lean {neko_lean.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["unlearn", "--help"], ["score", "-h"], ["--version"]])
def test_help_imports_none_of_the_heavy_packages(arguments):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'jinja2', 'bitsandbytes', 'rich'}\n"
        "atexit.register(lambda: print('imported:', *sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from neko_lean.cli import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and result.stderr == "imported:\n"
    assert result.stdout and "\x1b" not in result.stdout  # piped, so no color


def complete(words, shell="bash"):
    environment = {**os.environ, "_NEKO_LEAN_COMPLETE": f"complete_{shell}", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    command = [sys.executable, "-m", "neko_lean"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0 and result.stderr == ""
    return result.stdout.split()


def test_the_shell_completes_commands_and_their_options():
    assert complete("neko-lean un") == ["unlearn"]
    assert complete("neko-lean memorize --lear") == ["--learning-rate"]
    assert complete("neko-lean score --dry") == ["--dry-run"]


def test_the_completion_script_is_shown():
    # Without a shell as its parent process, typer asks for its name.
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "neko_lean", "--show-completion", "bash"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0 and "_NEKO_LEAN_COMPLETE=complete_bash" in result.stdout
