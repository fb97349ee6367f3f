"""The command line: one file a command, no logic. `neko-lean COMMAND --help` shows an example of each."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from neko_lean.cli.cache_teacher import cache_teacher
from neko_lean.cli.demo import demo
from neko_lean.cli.inspect import inspect
from neko_lean.cli.memorize import memorize
from neko_lean.cli.plan import plan
from neko_lean.cli.recipes import recipes
from neko_lean.cli.report import report
from neko_lean.cli.score import score
from neko_lean.cli.unlearn import unlearn
from neko_lean.ranks import size

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a language model forget, with one model in memory: the frozen teacher becomes a cache on disk.",
)
for command in (cache_teacher, inspect, plan, recipes, unlearn, score, report, memorize, demo):
    app.command(name=command.__name__.replace("_", "-"))(command)


def main() -> None:
    """Entry point of `neko-lean`."""
    if size() == 1:
        app()
        return
    code: object = 1
    try:
        app()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    # Not by Python's own way out: a student in shards holds on to the connections, and gloo's threads, which may still
    # wait for Python then, would abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
