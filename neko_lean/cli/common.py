"""What all commands share: common options, one-sentence errors with exit code 2, and JSON output."""

from __future__ import annotations

import errno
import functools
import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from neko_lean.cli.flags import collect_flags, signature_with_flags
from neko_lean.distributed import is_main_process, rank, world_size
from neko_lean.errors import Interrupted, NekoLeanError, first_line
from neko_lean.jsonio import nan_to_null
from neko_lean.options import option
from neko_lean.outputs import os_error_sentence
from neko_lean.recipe import DEFAULT, parse_override
from neko_lean.terminal import print_json, print_to_stderr

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or hub name (owner/name).")]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Commit, branch or tag of a MODEL on the hub.  [default: its newest]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress and no tables.")]
Split = Annotated[
    str | None,
    typer.Option(help="Read forget_SPLIT.* and retain_SPLIT.*, or a split of TOFU, such as forget10."),
]


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """A recipe, and values that replace some of its own."""

    recipe: str = option(DEFAULT, "Name of a shipped recipe, or a .toml file.")
    set: tuple[str, ...] = option((), "Replace a value of the recipe; repeatable.", metavar="KEY=VALUE")

    def overrides(self) -> dict[str, Any]:
        """The values that were given, by key of the recipe."""
        given = {key: value for key, value in asdict(self).items() if key not in ("recipe", "set")}
        return {**dict(map(parse_override, self.set)), **{key: value for key, value in given.items() if value}}


@dataclass(frozen=True, kw_only=True)
class MemoryFlags(RecipeFlags):
    """A recipe, with options for values that determine memory."""

    train_last: int | None = option(None, "Train only the last N layers, the final norm and an untied head.", min=1)
    offload_state: bool = option(False, "Keep the optimizer state in host memory.")
    offload_activations: bool = option(False, "Keep the layers' inputs in host memory.")
    state_bits: int | None = option(None, "Bits of the optimizer state: 8, or 4 with torchao.  [default: the recipe's]")


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(RecipeFlags):
    """A recipe for training, with options for values that are often changed."""

    max_steps: int | None = option(None, "Number of training steps.  [default: the recipe's]", min=1)


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function a command.

    Parameters that are dataclasses become one option per field. A NekoLeanError becomes one sentence on stderr and exit
    code 2; a signal becomes the command line that continues the run, and exit code 130, 143 or 129. Log messages of
    libraries are silenced.
    """

    def wrapped(**kwargs: Any) -> Any:
        _quieten_libraries()
        try:
            return function(**collect_flags(function, kwargs))
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
            if error.errno == errno.EPIPE:  # the reader of stdout has exited
                raise
            _print_error(os_error_sentence(error) or first_line(error))
            raise typer.Exit(2) from error

    # Typer reads the options from the signature and the annotations.
    described: Any = functools.update_wrapper(wrapped, function)
    described.__signature__ = signature_with_flags(function)
    described.__annotations__ = {
        name: parameter.annotation for name, parameter in described.__signature__.parameters.items()
    }
    return wrapped


def _print_error(sentence: str) -> None:
    """Print an error in a single write, because other ranks may print at the same time."""
    print_to_stderr(f"{'' if is_main_process() else f'rank {rank()}: '}error: {sentence}")


def _stopped(stop: Interrupted, resumes: bool) -> list[str]:
    """What a signal left on disk and, if the command can be resumed, the command line that continues it."""
    if stop.saved_state is None or not resumes:
        return [f"{stop}; the output folder was not written."]
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    name = ["neko-lean"]
    if world_size() > 1:
        name = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "neko_lean"]
    return [f"{stop}; {stop.saved_state}. Continue with:", f"  {shlex.join([*name, *arguments, '--resume'])}"]


def _quieten_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def pinned(model: str, revision: str | None) -> str:
    """MODEL at --revision, as owner/name@revision."""
    if revision is None:
        return model
    if Path(model).exists():
        raise NekoLeanError(f"--revision applies to a hub name, but {model} is a local path; leave it out.")
    return f"{model}@{revision}"


def emit(result: Any) -> None:
    """Print one JSON object on stdout, with null for NaN and infinity, which JSON cannot represent."""
    print_json(nan_to_null(result))


def gibibytes(count: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{count / 2**30:.2f} GiB"
