"""The command line: one file a command, no logic. `neko-lean COMMAND --help` shows an example of each.

A command's module is imported when the command is used, and it imports torch and transformers only when it runs, so
that help and shell completion answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from neko_lean.cli.help import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Make a language model forget, with one model in memory: the frozen teacher becomes a cache on disk.",
)


def _print_version(requested: bool) -> None:
    if requested:
        from neko_lean import __version__

        typer.echo(f"neko-lean {__version__}")
        raise typer.Exit


@app.callback()
def _options_before_the_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `neko-lean`."""
    name = "neko-lean"  # also as `python -m neko_lean`, in usage errors and for shell completion
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        app(prog_name=name)
        return
    code: object = 1
    try:
        app(prog_name=name)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    # Under torchrun, not by Python's own way out: a student in shards holds on to the connections, and gloo's threads,
    # which may still wait for Python then, would abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
