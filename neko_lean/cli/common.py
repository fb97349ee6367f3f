"""What all commands share: common options, one-sentence errors with exit code 2, and JSON output."""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from neko_lean.cli.flags import collect_flags, flag_of, signature_with_flags
from neko_lean.errors import Interrupted, NekoLeanError, first_line
from neko_lean.options import DATA, DEFAULT_RECIPE, MEMORY, MESSAGES, RECIPE, option

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or hub name (owner/name).")]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="REV", help="Commit, branch or tag of a MODEL on the hub.  [default: its newest]", rich_help_panel=DATA
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout and nothing else there.", rich_help_panel=MESSAGES),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress and no tables.", rich_help_panel=MESSAGES)]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", help="Print what the libraries say, and the seconds since the start.", rich_help_panel=MESSAGES
    ),
]


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """A recipe, and values that replace some of its own."""

    recipe: str = option(DEFAULT_RECIPE, "Name of a shipped recipe, or a .toml file.", RECIPE)
    set: tuple[str, ...] = option((), "Replace a value of the recipe; repeatable.", RECIPE, metavar="KEY=VALUE")

    def overrides(self) -> dict[str, Any]:
        """The given recipe values, by key. Raises NekoLeanError for two different values of a key."""
        from neko_lean.recipe import parse_override

        given = [(f"--set {text}", *parse_override(text)) for text in self.set]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("recipe", "set") and value is not None and value is not False:
                given.append((f"{flag_of(field)} {value}", field.metadata.get("key", field.name), value))

        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for origin, key, value in given:
            if key in values and values[key] != value:
                raise NekoLeanError(
                    f"recipe key {key} has two values, from {origins[key]} and from {origin}; leave one of them out."
                )
            values[key], origins[key] = value, origin
        return values


@dataclass(frozen=True, kw_only=True)
class MemoryFlags(RecipeFlags):
    """A recipe, with options for values that determine memory."""

    batch_size: int | None = option(
        None,
        "Most forget examples in an optimizer step (forget_rows); retain_rows come on top.  [default: the recipe's]",
        RECIPE,
        min=1,
        key="forget_rows",
    )
    train_last: int | None = option(
        None, "Train only the last N layers, the final norm and an untied head.", MEMORY, min=1
    )
    lora_rank: int | None = option(
        None, "Train LoRA adapters of this rank instead of the weights; needs neko-lean[lora].", MEMORY, min=1
    )
    quantize_base: str | None = option(
        None, "With --lora-rank, store the frozen weights in 4 or 8 bits: nf4 or int8.", MEMORY, metavar="FORMAT"
    )
    offload_state: bool = option(False, "Keep the optimizer state in host memory.", MEMORY)
    offload_activations: bool = option(False, "Keep the layers' inputs in host memory.", MEMORY)
    state_bits: int | None = option(
        None, "Bits of the optimizer state: 8, or 4 with torchao.  [default: the recipe's]", MEMORY
    )


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(RecipeFlags):
    """A recipe for training, with options for values that are often changed."""

    learning_rate: float | None = option(
        None, "Peak learning rate (lr).  [default: the recipe's]", RECIPE, key="lr", flags=("--learning-rate", "--lr")
    )
    batch_size: int | None = option(None, "Examples in an optimizer step.  [default: the recipe's]", RECIPE, min=1)
    epochs: float | None = option(
        None, "Passes over the larger set (epochs), instead of the recipe's max_steps.", RECIPE, min=0
    )
    max_steps: int | None = option(
        None, "Number of training steps (max_steps); decides if both are given.  [default: the recipe's]", RECIPE, min=1
    )

    def overrides(self) -> dict[str, Any]:
        """The given recipe values, by key. `--epochs` replaces the recipe's max_steps, which would otherwise decide."""
        values = super().overrides()
        return {"max_steps": 0, **values} if self.epochs is not None else values


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function a command.

    Parameters that are dataclasses become one option per field, and every command has `--verbose`. A NekoLeanError
    becomes one sentence on stderr and exit code 2; a signal becomes the command line that continues the run, and exit
    code 130, 143 or 129. Messages of libraries are silenced, unless `--verbose` asks for them.
    """

    def wrapped(*, verbose: bool = False, **kwargs: Any) -> Any:
        start = time.monotonic()
        try:
            if verbose and kwargs.get("quiet"):
                raise NekoLeanError("--quiet and --verbose contradict each other; remove one of them.")
            with _libraries_silenced(not verbose, hub_bars=not kwargs.get("quiet")):
                result = function(**collect_flags(function, kwargs))
                if verbose:
                    _print_time(time.monotonic() - start)
            return result
        except NekoLeanError as error:
            _print_error(str(error))
            raise typer.Exit(2) from error
        except Interrupted as stop:
            from neko_lean.distributed import is_main_process
            from neko_lean.terminal import print_to_stderr

            if is_main_process():
                print_to_stderr(*_stopped(stop, "resume" in kwargs))
            raise typer.Exit(128 + stop.number) from stop
        except KeyboardInterrupt as error:
            from neko_lean.terminal import print_to_stderr

            print_to_stderr("interrupted; the output folder was not written.")
            raise typer.Exit(130) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of stdout has exited
                raise
            from neko_lean.outputs import os_error_sentence

            _print_error(os_error_sentence(error) or first_line(error))
            raise typer.Exit(2) from error

    # Typer reads the options from the signature and the annotations.
    signature = signature_with_flags(function)
    verbose = inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose)
    described: Any = functools.update_wrapper(wrapped, function)
    described.__signature__ = signature.replace(parameters=[*signature.parameters.values(), verbose])
    described.__annotations__ = {
        name: parameter.annotation for name, parameter in described.__signature__.parameters.items()
    }
    return wrapped


def _print_error(sentence: str) -> None:
    """Print an error in a single write, because other ranks may print at the same time."""
    from neko_lean.distributed import is_main_process, rank
    from neko_lean.terminal import print_to_stderr

    print_to_stderr(f"{'' if is_main_process() else f'rank {rank()}: '}error: {sentence}")


def _print_time(seconds: float) -> None:
    from neko_lean.terminal import log_line

    log_line(f"finished after {seconds:.1f} s")


def _stopped(stop: Interrupted, resumes: bool) -> list[str]:
    """What a signal left on disk and, if the command can be resumed, the command line that continues it."""
    if stop.saved_state is None or not resumes:
        return [f"{stop}; the output folder was not written."]
    from neko_lean.distributed import world_size

    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    name = ["neko-lean"]
    if world_size() > 1:
        name = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "neko_lean"]
    return [f"{stop}; {stop.saved_state}. Continue with:", f"  {shlex.join([*name, *arguments, '--resume'])}"]


@contextmanager
def _libraries_silenced(silence: bool, *, hub_bars: bool) -> Iterator[None]:
    """While the block runs, hide what libraries print on stderr, except errors and the hub's download bars.

    Args:
        silence: hide it; otherwise only the time is shown at the start of each line.
        hub_bars: show the bars of downloads.
    """
    from neko_lean.terminal import show_elapsed_time

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    show_elapsed_time(not silence)
    if not silence:
        try:
            yield
        finally:
            show_elapsed_time(False)
        return

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not hub_bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            yield
        finally:
            logging.disable(level)


def pinned(model: str, revision: str | None) -> str:
    """MODEL at --revision, as owner/name@revision."""
    if revision is None:
        return model
    if Path(model).exists():
        raise NekoLeanError(f"--revision applies to a hub name, but {model} is a local path; leave it out.")
    return f"{model}@{revision}"


def emit(result: Any) -> None:
    """Print one JSON object on stdout, with null for NaN and infinity, which JSON cannot represent."""
    from neko_lean.jsonio import nan_to_null
    from neko_lean.terminal import print_json

    print_json(nan_to_null(result))


def print_training_plan(result: Mapping[str, Any]) -> None:
    """Print what a dry run of `unlearn` or `memorize` says."""
    from neko_lean.terminal import print_lines

    recipe, peak = result["recipe"], result["predicted_peak"]
    memory = "unknown, since the model's code needs real tensors" if peak is None else f"{gibibytes(peak)} predicted"
    rows, longest = sum(rows for rows, _ in result["largest_step"]), max(tokens for _, tokens in result["largest_step"])
    generated = result.get("self_generated", 0)
    written = f", with {generated} that the model would write, at their maximum length" if generated else ""
    most = "at most " if recipe["stop"] == "forgotten" else ""
    print_lines(
        *planned_output(result),
        f"  rows: {result['forget_rows']} forget, {result['retain_rows']} retain{written}; "
        f"{result['rows_truncated']} truncated",
        f"  steps: {most}{result['steps']} with recipe {recipe['name']}, lr {recipe['lr']}; the largest has {rows} "
        f"rows of at most {longest} tokens",
        f"  peak memory on {result['device']}: {memory}",
    )


def planned_output(result: Mapping[str, Any]) -> list[str]:
    """The first lines of what a dry run says: where the output would go."""
    replaced = ", replacing what is there" if result["replaces"] else ""
    return ["dry run: everything was checked, and nothing was written.", f"  output: {result['out']}{replaced}"]


def gibibytes(count: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{count / 2**30:.2f} GiB"
