"""`neko-lean demo`: all commands on a small world, with nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Json, command, emit
from neko_lean.errors import NekoLeanError
from neko_lean.options import DATA, DEFAULT_RECIPE, OUTPUT, RECIPE, SPLIT_HELP, DemoOptions


@command
def demo(
    run: DemoOptions,
    out: Annotated[
        Path, typer.Option(help="Folder to write: data, models, cache and scores.", rich_help_panel=OUTPUT)
    ] = Path("demo-run"),
    data: Annotated[
        Path | None,
        typer.Option(
            help="Real data instead of the made-up world: a folder with forget.* and retain.*.", rich_help_panel=DATA
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help=SPLIT_HELP, rich_help_panel=DATA)] = None,
    recipe: Annotated[
        str, typer.Option(help="Name of a shipped recipe, or a .toml file.", rich_help_panel=RECIPE)
    ] = DEFAULT_RECIPE,
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Number of training steps.  [default: the recipe's]", rich_help_panel=RECIPE),
    ] = None,
    json: Json = False,
) -> None:
    """Run all commands on a small made-up world, with nothing to download.

    It builds the world, memorizes it, unlearns with a recipe and with the paper's for comparison, and scores all three.

    Example: neko-lean demo --out demo-run    or    neko-lean demo --data lume/ --split validation --out lume-run
    """
    from neko_lean.distributed import world_size

    if world_size() > 1:
        raise NekoLeanError("demo runs in a single process: run it without torchrun.")
    from neko_lean.demo import demo as run_demo
    from neko_lean.scoring.table import score_table
    from neko_lean.terminal import print_lines, print_table

    result = run_demo(out, data=data, split=split, recipe=recipe, max_steps=max_steps, run=run)
    if json:
        emit(result)
    elif not run.quiet:
        print_table(score_table(result["scores"]))
        print_lines(*result["verdict"].split("\n"))
        print_lines(*(f"  {name:<18} {path}" for name, path in result["files"].items()))
