"""Options shared by the commands: one dataclass field each, with the help text that `--help` prints.

The Python API takes these dataclasses; `cli/flags.py` turns their fields into command-line options. So an option
is named, typed, defaulted and explained in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, **typer: Any) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: the field's default value.
        help: one plain sentence for `--help`.
        typer: further arguments of `typer.Option`, such as `min`, `metavar` or `flag` (the option's name on the
            command line, where it differs from the field's).
    """
    return field(default=default, metadata={"help": help, **typer})


@dataclass(frozen=True, kw_only=True)
class BasicOptions:
    """Where a command runs, what it prints, and whether it replaces its output."""

    device: str | None = option(None, "cpu, cuda or cuda:N.  [default: the GPU if there is one]")
    overwrite: bool = option(
        False, "Replace an output that neko-lean wrote, or an unfinished run; never anything else."
    )
    quiet: bool = option(False, "Print no progress and no tables.")


@dataclass(frozen=True, kw_only=True)
class OutputOptions(BasicOptions):
    """Options of a command that can be resumed."""

    resume: bool = option(False, "Continue an interrupted run of the same command; it ends in the same result.")


@dataclass(frozen=True, kw_only=True)
class RunOptions(OutputOptions):
    """Options of a training run (`unlearn`, `memorize`)."""

    seed: int = option(0, "Random seed for data order and stochastic rounding.")
    save_every: int = option(
        0,
        "Save every N steps, so that --resume can continue; 0 saves only when Ctrl-C, SIGTERM or SIGHUP stops the run.",
        min=0,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class DemoOptions(BasicOptions):
    """Options of the demo."""

    seed: int = option(0, "Random seed for the made-up data, data order and stochastic rounding.")
