"""`neko-lean demo`: all commands on a small world, with nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Json, command, emit
from neko_lean.distributed import world_size
from neko_lean.errors import NekoLeanError
from neko_lean.options import SPLIT_HELP, DemoOptions
from neko_lean.recipe import DEFAULT
from neko_lean.terminal import print_lines, print_table


@command
def demo(
    run: DemoOptions,
    out: Annotated[Path, typer.Option(help="Folder to write: data, models, cache and scores.")] = Path("demo-run"),
    data: Annotated[
        Path | None, typer.Option(help="Real data instead of the made-up world: a folder with forget.* and retain.*.")
    ] = None,
    split: Annotated[str | None, typer.Option(help=SPLIT_HELP)] = None,
    recipe: Annotated[str, typer.Option(help="Name of a shipped recipe, or a .toml file.")] = DEFAULT,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of training steps.  [default: the recipe's]")
    ] = None,
    json: Json = False,
) -> None:
    """Build a small world, memorize it, unlearn with a recipe and with the paper's for comparison, and score all three.

    Example: neko-lean demo --out demo-run    or    neko-lean demo --data lume/ --split validation --out lume-run
    """
    if world_size() > 1:
        raise NekoLeanError("demo runs in a single process: run it without torchrun.")
    from neko_lean.demo import demo as run_demo
    from neko_lean.scoring.table import score_table

    result = run_demo(out, data=data, split=split, recipe=recipe, max_steps=max_steps, run=run)
    if json:
        emit(result)
    elif not run.quiet:
        print_table(score_table(result["scores"]))
        print_lines(*result["verdict"].split("\n"))
        print_lines(*(f"  {name:<18} {path}" for name, path in result["files"].items()))
