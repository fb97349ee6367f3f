"""`neko-lean recipes`: list the shipped recipes, or show every value of some."""

from __future__ import annotations

from typing import Annotated

import typer

from neko_lean.cli.common import Json, Quiet, command, emit
from neko_lean.terminal import print_lines


@command
def recipes(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Recipes to show in full; names or .toml files.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the recipes. With names, show every value of these recipes that has an effect.

    Example: neko-lean recipes    or    neko-lean recipes calibrated my.toml --json
    """
    from neko_lean.recipe import DEFAULT, has_effect, load_recipe, recipe_names

    loaded = [load_recipe(name) for name in names or recipe_names()]
    if json:
        emit({"recipes": [recipe.values() for recipe in loaded]})
    elif not quiet:
        for recipe in loaded:
            default = " (the default of unlearn)" if recipe.name == DEFAULT else ""
            print_lines(f"{recipe.name}{default}: {recipe.summary}")
            if names:
                values = {key: value for key, value in recipe.values().items() if has_effect(key, recipe)}
                print_lines(
                    *(f"    {key} = {value!r}" for key, value in values.items() if key not in ("name", "summary"))
                )
