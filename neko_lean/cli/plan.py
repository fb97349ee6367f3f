"""`neko-lean plan`: predict the memory of a run from the model's config alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from neko_lean.cli.common import Json, Model, Quiet, RecipeFlags, Revision, command, emit, gibibytes, pinned
from neko_lean.errors import NekoLeanError
from neko_lean.options import MEMORY, RECIPE, option


@dataclass(frozen=True, kw_only=True)
class PlanFlags(RecipeFlags):
    """The recipe that is planned."""

    batch_tokens: int | None = option(None, "Tokens of a step.  [default: the recipe's]", RECIPE, min=1)


@command
def plan(
    model: Model,
    recipe: PlanFlags,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of a GPU, such as 8GB: find options that fit it.", rich_help_panel=MEMORY
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Predict the memory of each GPU under torchrun with N processes.",
            rich_help_panel=MEMORY,
        ),
    ] = 1,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict how much GPU memory a run needs.

    It is compared with training with two models. Only the config is read, no weights.

    Example: neko-lean plan allenai/OLMo-1B-0724-hf --gpu 8GB
    """
    from neko_lean.memory import plan_run

    gpu_bytes = _parse_size(gpu) if gpu else None
    result = plan_run(pinned(model, revision), recipe.recipe, recipe.overrides(), gpu_bytes, gpus)
    if json:
        emit(result)
    elif not quiet:
        if gpus > 1:
            result["title"] += f"; neko-lean on each of {gpus} GPUs"
        _print_estimates(result)
        if gpu is not None:
            _print_fit(result, gpu)


def _print_estimates(result: dict[str, Any]) -> None:
    """Print a table with one column per setup and one row per line of its estimate."""
    from rich import box
    from rich.table import Table

    from neko_lean.terminal import print_lines, print_table

    estimates = result["ways"]
    table = Table(box=box.SIMPLE, title_justify="left", title=result["title"])
    table.add_column("")
    for name in estimates:
        table.add_column(name, justify="right", max_width=22)

    for line in dict.fromkeys(line for estimate in estimates.values() for line in estimate["lines"]):
        cells = (estimate["lines"].get(line) for estimate in estimates.values())
        table.add_row(line, *("" if cell is None else gibibytes(cell) for cell in cells))

    table.add_section()
    table.add_row("peak on the device", *(gibibytes(estimate["peak"]) for estimate in estimates.values()))
    on_cpu = [
        estimate["peak"] + estimate["host"] + estimate["cpu"] if estimate["cpu"] else None
        for estimate in estimates.values()
    ]
    table.add_row("peak on a CPU instead", *("" if peak is None else gibibytes(peak) for peak in on_cpu))
    print_table(table)
    print_lines(
        "The peak on a CPU is the growth of the process's resident set, including allocator overhead and code loaded "
        "by the first step."
    )


def _print_fit(result: dict[str, Any], gpu: str) -> None:
    """Say with which options the run fits the GPU."""
    from neko_lean.memory import CONTEXT
    from neko_lean.terminal import print_lines

    room = f"{gpu} less {gibibytes(CONTEXT)} for CUDA itself"
    options = result["options"]
    if options is None:
        print_lines(
            f"No option makes it fit {room}: lower --set batch_tokens=N, or train fewer layers (--set train_last=N)."
        )
    elif options:
        print_lines(f"Fits {room} with {' '.join(options)}: peak {gibibytes(result['fits']['peak'])}.")
    else:
        print_lines(f"Fits {room} without further options.")


def _parse_size(text: str) -> int:
    """Bytes of a size such as 8GB or 7.5 GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise NekoLeanError(f"--gpu {text!r} is not a size; write it like 8GB.")
    return int(float(match[1]) * 2**30)
