"""`neko-lean plan`: what a run will hold and peak at, from the config alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from neko_lean.cli.common import Json, Model, Quiet, RecipeFlags, Revision, command, emit, gibibytes, pinned
from neko_lean.errors import NekoLeanError
from neko_lean.options import option
from neko_lean.terminal import print_lines, print_table


@dataclass(frozen=True, kw_only=True)
class PlanFlags(RecipeFlags):
    """The recipe that is planned."""

    batch_tokens: int | None = option(None, "Tokens of a step.  [default: the recipe's]", min=1)


@command
def plan(
    model: Model,
    recipe: PlanFlags,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a GPU, such as 8GB: say which options fit it.")
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of GPUs under torchrun: say what each of them needs.")
    ] = 1,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict the memory that `unlearn` needs, and that two models would need. Reads the config, no weights.

    Example: neko-lean plan allenai/OLMo-1B-0724-hf --gpu 8GB
    """
    from neko_lean.memory import CONTEXT, plan_run

    size = _bytes(gpu) if gpu else None
    found = plan_run(pinned(model, revision), recipe.recipe, recipe.overrides(), size, gpus)
    if json:
        emit(found)
        return
    if quiet:
        return
    if gpus > 1:
        found["title"] += f"; neko-lean on each of {gpus} GPUs"
    _print(found)
    if size is not None:
        room = f"{gpu} less {gibibytes(CONTEXT)} for CUDA itself"
        if found["options"] is None:
            print_lines(
                f"No option makes it fit {room}: lower --set batch_tokens=N, or train fewer layers "
                f"(--set train_last=N)."
            )
        elif found["options"]:
            print_lines(f"Fits {room} with {' '.join(found['options'])}: peak {gibibytes(found['fits']['peak'])}.")
        else:
            print_lines(f"Fits {room} as it is.")


def _print(found: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title_justify="left", title=found["title"])
    table.add_column("")
    for name in found["ways"]:
        table.add_column(name, justify="right", max_width=22)
    for line in dict.fromkeys(key for way in found["ways"].values() for key in way["lines"]):
        cells = (way["lines"].get(line) for way in found["ways"].values())
        table.add_row(line, *("" if cell is None else gibibytes(cell) for cell in cells))
    table.add_section()
    table.add_row("peak on the device", *(gibibytes(way["peak"]) for way in found["ways"].values()))
    on_cpu = [way["peak"] + way["host"] + way["cpu"] if way["cpu"] else None for way in found["ways"].values()]
    table.add_row("peak on a CPU instead", *("" if peak is None else gibibytes(peak) for peak in on_cpu))
    print_table(table)
    print_lines(
        "On a CPU it is the growth of the resident set, with the allocator's share and the code of the first step."
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise NekoLeanError(f"--gpu {text!r} is no size: write it as 8GB.")
    return int(float(match[1]) * 2**30)
