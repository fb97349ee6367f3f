"""The largest step of a recipe, compared with the batches that the recipe makes."""

import random

import pytest

from neko_lean.memory.largest_step import largest_step
from neko_lean.recipe import load_recipe
from neko_lean.training.schedules import batches, phases


@pytest.mark.parametrize(
    ("name", "change", "rows"),
    [
        ("sequential", {}, 8),
        ("mismatch", {}, 16 + 12),
        ("idk", {}, 16 + 12),
        ("neko", {"forget_rows": 3, "retain_rows": 2}, 5),
        ("neko", {"retain_objective": "none"}, 32),
        ("alternating", {}, 16),
        ("alternating", {"forget_rows": 40, "retain_rows": 3, "batch_tokens": 20_480}, 40),
        ("memorize", {}, 16),
        ("neko", {"batch_tokens": 64}, 2),
    ],
)
def test_the_largest_step_is_one_that_the_recipe_can_make(name, change, rows):
    """Compared with real batches of examples that are long where that makes a step large."""
    recipe = load_recipe(name, change)
    assert sum(count for count, _ in largest_step(recipe)) == rows
    assert {length for _, length in largest_step(recipe)} == {recipe.max_length}

    length, most = recipe.max_length, 0
    has_objective = recipe.forget_objective != "none"
    filling = min(length, (recipe.batch_tokens - recipe.forget_rows) // recipe.retain_rows)
    for forget_length, retain_length in ((length, length), (length - 1, 1), (1, length), (1, max(1, filling))):
        forget = [forget_length] * 120 if has_objective or recipe.substitute != "none" else []
        retain = [retain_length] * 120 if recipe.retain_objective != "none" else []
        for phase in phases(recipe, forget, retain, random.Random(0))[:2]:
            steps = batches(recipe, phase, forget, retain, random.Random(0))
            for _, (forget_indices, retain_indices) in zip(range(20), steps):  # noqa: B905
                tokens = len(retain_indices) * retain_length
                tokens += len(forget_indices) * forget_length if has_objective else 0
                tokens += len(forget_indices) * length if recipe.substitute != "none" else 0
                most = max(most, tokens)
    # Examples are not cut to fill a step, so a step that short examples fill may lack one.
    assert most - length < rows * length and most > (rows - 2) * length
