"""The group of commands: imported by name on first use, with options in named groups and one-sentence usage errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from neko_lean.options import PANELS

# Each command's summary, which repeats the first sentence of its help, so that `neko-lean --help` imports no command.
COMMANDS = {
    "cache-teacher": "Run the teacher once over the retain set and store its top-k probabilities.",
    "inspect": "Show what a teacher cache was made from and how large it is.",
    "plan": "Predict how much GPU memory a run needs.",
    "recipes": "List the recipes, or explain every value of some.",
    "unlearn": "Train a model to forget the forget set and preserve its behaviour on the retain set.",
    "score": "Score a model with the shared task's metrics, and with others that reveal what those miss.",
    "report": "Write an HTML page that shows what runs forgot, preserved and leaked.",
    "memorize": "Fine-tune a model with cross-entropy to make a target or a gold model.",
    "demo": "Run all commands on a small made-up world, with nothing to download.",
}

# A system message may be empty, and the devices that exist are named where a device is chosen.
_MAY_BE_EMPTY = ("--system", "--device")


class Command(TyperCommand):
    """A command whose help lists its options in named groups, as plain text in any terminal or file."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the command's arguments. An empty one is refused: as a path it would mean the current folder."""
        for before, arg in zip(["", *args], args, strict=False):
            option, equals, value = arg.partition("=") if arg.startswith("--") else (before, "=", arg)
            if equals and not value and option not in _MAY_BE_EMPTY and not ctx.resilient_parsing:
                name = option if option.startswith("-") else "an argument"
                ctx.fail(f"{name} is empty; expected a value: check the shell variable that it comes from")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section per group, in the order of PANELS."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            is_argument = param.param_type_name == "argument"
            # The option --help belongs to no group.
            panel = "Arguments" if is_argument else getattr(param, "rich_help_panel", None) or PANELS[-1]
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(panel, []).append(record)

        for panel in ("Arguments", *PANELS):
            if panel in groups:
                with formatter.section(panel):
                    formatter.write_dl(groups[panel])


class Commands(TyperGroup):
    """All commands. A command's module is imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command; None if there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        alone.command(cmd_name, cls=Command)(getattr(import_module(f"neko_lean.cli.{name}"), name))
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the arguments name."""
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            from neko_lean.cli.suggestions import unknown_command

            ctx.fail(unknown_command(args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse the arguments before the command's name."""
        with _one_sentence():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's arguments and run it."""
        with _one_sentence():
            return super().invoke(ctx)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Print usage errors as one sentence, with control characters escaped, which any argument may contain."""
    try:
        yield
    except Exception as error:
        # Some versions of typer ship click's exceptions and others import them, so they are recognized by this method.
        usage_error: Any = error
        if hasattr(usage_error, "format_message"):
            usage_error.show = partial(_show_usage_error, usage_error)
        raise


def _show_usage_error(error: Any, file: object = None) -> None:
    from neko_lean.terminal import print_to_stderr

    context: Any = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print_to_stderr(*context.get_help().splitlines())
    elif hasattr(error, "option_name") and hasattr(error, "possibilities") and context is not None:
        from neko_lean.cli.suggestions import unknown_option

        print_to_stderr(f"error: {unknown_option(error.option_name, context.command, context.command_path)}")
    else:
        message = error.format_message()
        if context is not None and not message.endswith("?"):
            message = f"{message.rstrip('.')}; see {context.command_path} --help."
        print_to_stderr(f"error: {message[:1].lower()}{message[1:]}")
