"""Names of recipes and keys from other programs: the suggestion is the name here."""

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.recipe import KEY_SYNONYMS, NAME_SYNONYMS, load_recipe, recipe_keys, recipe_names


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("ga", "'neko' or 'graddiff'?"), ("grad_ascent", "'neko' or 'graddiff'?"), ("GradDiff", "'graddiff'?"),
     ("grad_diff", "'graddiff'?"), ("NPO", "'npo'?"), ("SimNPO", "'simnpo'?"), ("neko_published", "'neko-published'?"),
     ("nekoo", "'neko'?"), ("RMU", "choose from alternating, base-kl, calibrated, ")],
)  # fmt: skip
def test_an_unknown_recipe_names_the_nearest(name, suggestion):
    with pytest.raises(NekoLeanError) as error:
        load_recipe(name)
    assert suggestion in str(error.value)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("learning_rate", "'lr'"), ("LR", "'lr'"), ("num_train_epochs", "'epochs'"), ("max_seq_length", "'max_length'"),
     ("batch_size", "'forget_rows' or 'retain_rows'"), ("weight-decay", "'weight_decay'"), ("lrr", "'lr'")],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(key, suggestion):
    with pytest.raises(NekoLeanError) as error:
        load_recipe("neko", {key: 1})
    assert f"unknown key {key!r}; did you mean {suggestion}?" in str(error.value)


def test_every_synonym_is_a_name_that_exists():
    assert {name for names in NAME_SYNONYMS.values() for name in names} <= set(recipe_names())
    assert {name for names in KEY_SYNONYMS.values() for name in names} <= set(recipe_keys())
    for synonym in (*NAME_SYNONYMS, *KEY_SYNONYMS):
        assert synonym == synonym.lower() and "_" not in synonym
    assert not set(NAME_SYNONYMS) & set(recipe_names()) and not set(KEY_SYNONYMS) & set(recipe_keys())
