"""Options dataclasses as command-line options."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import typer
from typer.testing import CliRunner

from neko_lean.cli.common import command
from neko_lean.options import CacheOptions, OutputOptions, RunOptions, ScoreInputs, ScoreSettings, option


@dataclass(frozen=True, kw_only=True)
class Example:
    """One field of each kind that options have."""

    count: int = option(3, "A number.", min=1)
    folder: str | Path | None = option(None, "A path.")
    names: tuple[str, ...] = option((), "Repeatable.", flags=("--name",))
    loud: bool = option(False, "A switch.")


def run(*arguments):
    received = []

    @command
    def example(target: str, options: Example) -> None:
        """An example."""
        received.append((target, options))

    app = typer.Typer()
    app.command()(example)
    return CliRunner().invoke(app, [str(argument) for argument in arguments]), received


def test_a_field_is_an_option():
    result, received = run("x")
    assert result.exit_code == 0 and received == [("x", Example())]
    _, received = run("x", "--count", 5, "--folder", "a/b", "--name", "p", "--name", "q", "--loud")
    assert received == [("x", Example(count=5, folder=Path("a/b"), names=("p", "q"), loud=True))]
    result, received = run("x", "--count", 0)
    assert result.exit_code == 2 and not received
    help_text = run("--help")[0].stdout
    assert "A number." in help_text and "--no-loud" not in help_text


def test_every_option_is_explained_in_a_sentence():
    for kind in (CacheOptions, OutputOptions, RunOptions, ScoreInputs, ScoreSettings):
        for field in dataclasses.fields(kind):
            assert field.metadata["help"][0].isupper() or field.name in ("device", "dtype"), (kind, field.name)


def test_the_command_line_does_not_wait_for_transformers():
    code = "import sys, neko_lean.cli; print(*sorted({'transformers', 'bitsandbytes', 'pyarrow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
