"""Every key of every recipe is explained in one sentence, and in one place."""

import tomllib

import pytest

from neko_lean.recipe import EXPLANATIONS, FOLDER, explain, load_recipe, recipe_names


def test_the_explained_keys_are_those_of_base_toml_in_its_order():
    assert list(EXPLANATIONS) == list(tomllib.loads((FOLDER / "base.toml").read_text()))


@pytest.mark.parametrize("name", recipe_names())
def test_every_value_of_a_recipe_is_explained_in_one_sentence(name):
    recipe = load_recipe(name)
    for key in set(recipe.values()) - {"name", "summary"}:
        text = explain(key, recipe)
        assert text.endswith(".") and "\n" not in text and len(text) <= 100, (key, text)
        assert text[0].isupper() or text[0] == "'", (key, text)
