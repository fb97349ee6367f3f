"""The command line: one file a command, no logic. `neko-lean COMMAND --help` shows an example of each."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import typer
from typer.core import TyperGroup

from neko_lean.cli.cache_teacher import cache_teacher
from neko_lean.cli.demo import demo
from neko_lean.cli.inspect import inspect
from neko_lean.cli.memorize import memorize
from neko_lean.cli.plan import plan
from neko_lean.cli.recipes import recipes
from neko_lean.cli.report import report
from neko_lean.cli.score import score
from neko_lean.cli.unlearn import unlearn
from neko_lean.distributed import world_size
from neko_lean.terminal import print_to_stderr


@contextmanager
def _printable_usage() -> Iterator[None]:
    """Show usage errors with control characters escaped, which a path or a number on the command line may contain."""
    try:
        yield
    except Exception as error:
        # Some versions of typer ship click's exceptions and others import them, so they are recognized by this method.
        usage_error: Any = error
        if hasattr(usage_error, "format_message"):
            usage_error.show = partial(_show_usage, usage_error)
        raise


def _show_usage(error: Any, file: object = None) -> None:
    context = getattr(error, "ctx", None)
    usage = [] if context is None else context.get_usage().splitlines()
    hint = [] if context is None else [f"Try '{context.command_path} --help' for help.", ""]
    print_to_stderr(*usage, *hint, f"Error: {error.format_message()}")


class Commands(TyperGroup):
    """The commands, with usage errors that are safe to print."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse the arguments before the command's name."""
        with _printable_usage():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's arguments and run it."""
        with _printable_usage():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
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
    if world_size() == 1:
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
