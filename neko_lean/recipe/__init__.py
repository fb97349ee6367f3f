"""Recipes: one TOML file a method, which states what is its own and inherits the rest from base.toml."""

from neko_lean.recipe.checks import STEP_ORDERS, SUBSTITUTES
from neko_lean.recipe.effects import has_effect
from neko_lean.recipe.explanations import EXPLANATIONS, explain
from neko_lean.recipe.loading import DEFAULT, FOLDER, load_recipe, parse_override, recipe_keys, recipe_names, recipes
from neko_lean.recipe.recipe import (
    AUTO,
    Recipe,
    forgets,
    needs_alternatives,
    needs_forget_cache,
    needs_teacher,
    reads_cache,
    reads_forget_losses,
    reads_retain,
    substitutes_retain_answers,
    trains_on_teacher,
    uses_anchor,
    uses_levels,
)
from neko_lean.recipe.synonyms import KEY_SYNONYMS, NAME_SYNONYMS

__all__ = [
    "AUTO",
    "DEFAULT",
    "EXPLANATIONS",
    "FOLDER",
    "KEY_SYNONYMS",
    "NAME_SYNONYMS",
    "STEP_ORDERS",
    "SUBSTITUTES",
    "Recipe",
    "explain",
    "forgets",
    "has_effect",
    "load_recipe",
    "needs_alternatives",
    "needs_forget_cache",
    "needs_teacher",
    "parse_override",
    "reads_cache",
    "reads_forget_losses",
    "reads_retain",
    "recipe_keys",
    "recipe_names",
    "recipes",
    "substitutes_retain_answers",
    "trains_on_teacher",
    "uses_anchor",
    "uses_levels",
]
