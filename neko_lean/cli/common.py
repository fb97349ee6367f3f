"""What every command shares: its common options, its one-sentence errors, and its one JSON object."""

from __future__ import annotations

import errno
import functools
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from neko_lean.distributed import is_main_process, rank, world_size
from neko_lean.errors import Interrupted, NekoLeanError, first_line
from neko_lean.jsonio import nan_to_null
from neko_lean.outputs import os_error_sentence
from neko_lean.terminal import print_json, print_to_stderr

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or hub name (owner/name).")]


Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Commit, branch or tag of a MODEL on the hub.  [default: its newest]")
]


Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.  [default: the GPU where there is one]")]


Seed = Annotated[int, typer.Option(help="Of the order of rows and of the rounding.")]


SaveEvery = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Save every N steps, so that --resume can go on; 0: only when Ctrl-C, SIGTERM or SIGHUP stops it.",
    ),
]


Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last save of the same run; it ends in the same weights.")
]


Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an output that neko-lean wrote, or an unfinished run; never anything else."
    ),
]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no tables.")]


Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; repeatable.")
]


MaxSteps = Annotated[int | None, typer.Option(min=1, help="Most steps to take.  [default: the recipe's]")]


Split = Annotated[str | None, typer.Option(help="Read forget_SPLIT.* and retain_SPLIT.*, as LUME names its files.")]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a NekoLeanError one sentence on stderr and exit code 2, and a signal the way to go on and exit code 130 or
    143 (or 129, of SIGHUP); quieten what libraries say to each other."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _quieten_libraries()
        try:
            return function(*args, **kwargs)
        except NekoLeanError as error:
            _print_error(str(error))
            raise typer.Exit(2) from error
        except Interrupted as stop:
            if is_main_process():
                print_to_stderr(*_stopped(stop, "resume" in kwargs))
            raise typer.Exit(128 + stop.number) from stop
        except KeyboardInterrupt as error:
            print_to_stderr("interrupted; the output folder was not written.")
            raise typer.Exit(130) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read stdout has ended
                raise
            _print_error(os_error_sentence(error) or first_line(error))
            raise typer.Exit(2) from error

    return wrapped


def _print_error(sentence: str) -> None:
    """One line on stderr, in one piece: other ranks write at the same time."""
    print_to_stderr(f"{'' if is_main_process() else f'rank {rank()}: '}error: {sentence}")


def _stopped(stop: Interrupted, resumes: bool) -> list[str]:
    """What a signal has left, and the command line that goes on from it, where the command can: a line each."""
    if stop.saved_state is None or not resumes:
        return [f"{stop}; the output folder was not written."]
    again = [one for one in sys.argv[1:] if one != "--resume"]
    name = ["neko-lean"]
    if world_size() > 1:
        name = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "neko_lean"]
    return [f"{stop}; {stop.saved_state}. Continue with:", f"  {shlex.join([*name, *again, '--resume'])}"]


def _quieten_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def pinned(model: str, revision: str | None) -> str:
    """MODEL at --revision, as owner/name@revision: what is downloaded, and what files call the model."""
    if revision is None:
        return model
    if Path(model).exists():
        raise NekoLeanError(f"--revision is for a hub name, and {model} is here already: leave it out.")
    return f"{model}@{revision}"


def overrides(pairs: list[str] | None, **options: Any) -> dict[str, Any]:
    """--set pairs, and the options that were given, as values of a recipe."""
    from neko_lean.recipes import parse_override

    given = {key: value for key, value in options.items() if value is not None}
    return {**dict(parse_override(pair) for pair in pairs or []), **given}


def emit(result: Any) -> None:
    """One JSON object on stdout; null stands for NaN and infinities, which JSON does not have."""
    print_json(nan_to_null(result))


def gibibytes(count: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{count / 2**30:.2f} GiB"
