"""`neko-lean recipes`: what ships, and every value."""

from __future__ import annotations

from typing import Annotated

import typer

from neko_lean.cli.common import Json, Quiet, command, emit
from neko_lean.terminal import print_lines

ABOUT = ("name", "summary")


@command
def recipes(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Recipes, or .toml files.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the recipes; of those named, every value that has an effect.

    Example: neko-lean recipes    or    neko-lean recipes calibrated my.toml --json
    """
    from neko_lean.recipes import DEFAULT, has_effect, load_recipe, recipe_names

    found = [load_recipe(name) for name in names or recipe_names()]
    if json:
        emit({"recipes": [one.values() for one in found]})
    elif not quiet:
        for one in found:
            print_lines(f"{one.name}{' (the default of unlearn)' if one.name == DEFAULT else ''}: {one.summary}")
            if names:
                shown = {k: v for k, v in one.values().items() if k not in ABOUT and has_effect(k, one)}
                print_lines(*(f"    {k} = {v!r}" for k, v in shown.items()))
