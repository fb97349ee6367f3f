"""`neko-lean recipes`: list the shipped recipes, or show every value of some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from neko_lean.cli.common import Json, Quiet, command, emit

if TYPE_CHECKING:
    from neko_lean.recipe import Recipe


@command
def recipes(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Recipes to show in full; names or .toml files.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the recipes, or explain every value of some.

    Values that have no effect on a recipe are left out.

    Example: neko-lean recipes    or    neko-lean recipes calibrated my.toml --json
    """
    from neko_lean.recipe import DEFAULT, load_recipe, recipe_names
    from neko_lean.terminal import print_lines

    loaded = [load_recipe(name) for name in names or recipe_names()]
    if json:
        emit({"recipes": [recipe.values() for recipe in loaded]})
    elif not quiet:
        for recipe in loaded:
            default = " (the default of unlearn)" if recipe.name == DEFAULT else ""
            print_lines(f"{recipe.name}{default}: {recipe.summary}")
            if names:
                print_lines(*_explained(recipe))


def _explained(recipe: Recipe) -> list[str]:
    """One line for each value that has an effect, with what it means."""
    from neko_lean.recipe import explain, has_effect

    values = {key: value for key, value in recipe.values().items() if key not in ("name", "summary")}
    settings = {key: f"{key} = {value!r}" for key, value in values.items() if has_effect(key, recipe)}
    width = min(34, max(map(len, settings.values())))
    return [f"    {setting:<{width}}  {explain(key, recipe)}" for key, setting in settings.items()]
