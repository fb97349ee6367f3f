"""Recipes: the shipped ones, overrides, and what is refused."""

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.recipes import load_recipe, parse_override, recipe_names


def test_shipped_recipes_load():
    assert {"memorize", "neko", "neko-published"} <= set(recipe_names())
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_neko_is_the_papers():
    neko = load_recipe("neko")
    assert (neko.forget_objective, neko.forget_weight) == ("ga", 0.2)
    assert (neko.retain_objective, neko.retain_weight) == ("kl", 1.0)
    assert (neko.lr, neko.forget_rows, neko.retain_rows, neko.max_steps) == (5e-5, 32, 32, 500)
    assert (neko.schedule, neko.warmup, neko.format, neko.max_length, neko.patience) == ("linear", 0.0, "neko", 128, 4)


def test_published_differs_where_the_code_does():
    paper, code = load_recipe("neko"), load_recipe("neko-published")
    changed = {key for key, value in vars(paper).items() if vars(code)[key] != value}
    assert changed == {
        "name", "summary", "measured", "forget_reduction", "answer_skip", "retain_reduction", "eval_every", "patience"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "pair"),
    [("lr=1e-5", ("lr", 1e-5)), ("format=plain", ("format", "plain")),
     ("append_eos=false", ("append_eos", False)),
     ('format="plain"', ("format", "plain")), ("max_steps=3", ("max_steps", 3))],
)  # fmt: skip
def test_overrides(text, pair):
    assert parse_override(text) == pair
    assert getattr(load_recipe("neko", dict([pair])), pair[0]) == pair[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [({"lrr": 1.0}, "lrr"), ({"lr": "fast"}, "lr"), ({"lr": 0.0}, "lr"), ({"lr": float("nan")}, "lr"),
     ({"format": "chat"}, "format"), ({"max_steps": 1.5}, "max_steps"), ({"max_steps": True}, "max_steps"),
     ({"patience": -1}, "patience"), ({"max_steps": 0}, "max_steps"), ({"beta1": 1.0}, "beta1"),
     ({"forget_objective": "none", "retain_objective": "none"}, "objective"),
     ({"forget_objective": "dpo"}, "refusal"), ({"forget_objective": "undial"}, "gamma"),
     ({"order": "random"}, "order"),
     ({"substitute": "random"}, "go together"), ({"substitute_weight": 1.0}, "go together"),
     ({"chunk_rows": 0}, "chunk"),
     ({"choose": "quality", "eval_every": 0}, "eval_every"), ({"train_only": "mlp("}, "regular expression")],
)  # fmt: skip
def test_what_cannot_be_is_named(override, words):
    with pytest.raises(NekoLeanError, match=words):
        load_recipe("neko", override)


def test_a_users_own_file(tmp_path):
    from neko_lean.recipes import FOLDER

    text = (FOLDER / "neko.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("lr = 5e-5", "lr = 1"))
    mine = load_recipe(tmp_path / "mine.toml")
    assert (mine.name, mine.lr) == ("mine", 1.0)
    (tmp_path / "short.toml").write_text("lr = 1.0")
    with pytest.raises(NekoLeanError, match="lacks summary"):
        load_recipe(tmp_path / "short.toml")
    (tmp_path / "bad.toml").write_text("lr = ")
    with pytest.raises(NekoLeanError, match=r"bad\.toml"):
        load_recipe(tmp_path / "bad.toml")
    with pytest.raises(NekoLeanError, match="unknown"):
        load_recipe("nekoo")
    with pytest.raises(NekoLeanError, match="key=value"):
        parse_override("lr")
