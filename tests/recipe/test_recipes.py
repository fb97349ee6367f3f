"""Recipes: the shipped ones, inheritance, overrides, and what is refused."""

import dataclasses
import itertools
import json
import random
import tomllib

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.objectives import FORGET_OBJECTIVES, REDUCTIONS, RETAIN_OBJECTIVES
from neko_lean.recipe import (
    FOLDER,
    STEP_ORDERS,
    SUBSTITUTES,
    has_effect,
    load_recipe,
    parse_override,
    recipe_names,
)
from neko_lean.training.schedules import batches, phases


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
        "name", "summary", "forget_reduction", "answer_skip", "retain_reduction", "eval_every", "patience"
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
    [
        ({"lrr": 1.0}, "unknown key 'lrr'; did you mean 'lr'"),
        ({"zzzzz": 1.0}, "unknown key 'zzzzz'; choose from"),
        ({"lr": "fast"}, "lr must be > 0, or 'auto', got 'fast'"),
        ({"lr": 0.0}, "lr must be > 0, or 'auto', got 0.0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"format": "plian"}, "unknown prompt format 'plian'; did you mean 'plain'?"),
        ({"max_steps": 1.5}, "max_steps must be of type int"),
        ({"max_steps": True}, "max_steps must be of type int"),
        ({"patience": -1}, "patience must be >= 0"),
        ({"max_steps": 0}, "max_steps or epochs must be > 0"),
        ({"beta1": 1.0}, "beta1 must be < 1"),
        ({"forget_objective": "none", "retain_objective": "none"}, "neither a forget_objective nor"),
        ({"forget_objective": "dpo"}, "requires substitute 'refusal'"),
        ({"stop": "never"}, "stop must be one of steps, forgotten"),
        ({"stop": "forgotten"}, "requires a forget_objective with levels, such as calibrated, got 'ga'"),
        ({"forget_objective": "calibrated", "stop": "forgotten", "patience": 2}, "exclude each other"),
        ({"forget_objective": "calibrated", "stop": "forgotten", "eval_every": 0}, "requires eval_every > 0"),
        ({"forget_objective": "undial", "gamma": 0.0}, "gamma must be > 0"),
        ({"forget_objective": "undial", "retain_objective": "ce"}, "requires retain_objective kl"),
        ({"order": "random"}, "order must be one of"),
        ({"substitute": "random"}, "go together"),
        ({"substitute_weight": 1.0}, "has no effect; it requires a substitute"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"choose": "quality", "eval_every": 0}, "eval_every"),
        ({"train_only": "mlp("}, "regular expression"),
    ],
)
def test_what_cannot_be_is_named(override, words):
    with pytest.raises(NekoLeanError, match=words):
        load_recipe("neko", override)


def test_a_users_own_file(tmp_path):
    text = (FOLDER / "neko.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("lr = 5e-5", "lr = 1"))
    mine = load_recipe(tmp_path / "mine.toml")
    assert (mine.name, mine.lr) == ("mine", 1.0)
    assert dataclasses.replace(mine, name="neko", lr=5e-5) == load_recipe("neko")
    (tmp_path / "bad.toml").write_text("lr = ")
    with pytest.raises(NekoLeanError, match=r"bad\.toml"):
        load_recipe(tmp_path / "bad.toml")
    with pytest.raises(NekoLeanError, match="unknown recipe 'nekoo'; did you mean 'neko'"):
        load_recipe("nekoo")
    with pytest.raises(NekoLeanError, match="key=value"):
        parse_override("lr")


def test_no_shipped_file_states_a_key_without_effect():
    for name in recipe_names():
        recipe = load_recipe(name)
        stated = tomllib.loads((FOLDER / f"{name}.toml").read_text())
        assert [key for key in stated if not has_effect(key, recipe)] == [], name


@pytest.mark.parametrize(
    ("name", "override"),
    [("neko", {"beta": 0.1}), ("neko", {"gamma": 0.0}), ("neko", {"level": 5.0}), ("neko", {"chunk_rows": 8}),
     ("neko", {"substitute_weight": 0.5}), ("neko", {"epochs": 3.0}), ("npo", {"gamma": 1.0}), ("npo", {"level": 1.0}),
     ("npo", {"patience": 2}),
     ("calibrated", {"stop": "forgotten", "eval_every": 5, "schedule": "constant"}),
     ("undial", {"beta": 1.0}), ("calibrated", {"beta": 1.0}),
     ("idk", {"forget_weight": 1.0}), ("idk", {"answer_skip": 1}), ("idk", {"forget_span": "all"}),
     ("idk", {"forget_reduction": "tokens"}), ("memorize", {"forget_weight": 1.0}),
     ("neko", {"answer_skip": 1, "forget_span": "all"}),
     ("graddiff", {"retain_objective": "none", "retain_weight": 2.0}),
     *[(name, {"forget_reduction": r}) for name in ("npo", "simnpo", "dpo") for r in ("tokens", "positions")]],
)  # fmt: skip
def test_a_key_without_effect_is_refused(name, override, tmp_path):
    with pytest.raises(NekoLeanError, match="has no effect"):
        load_recipe(name, override)
    # In a file of the user's as well.
    lines = {**tomllib.loads((FOLDER / f"{name}.toml").read_text()), **override}
    text = "".join(f"{key} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for key, v in lines.items())
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(NekoLeanError, match="has no effect"):
        load_recipe(tmp_path / "mine.toml")


def test_an_override_may_leave_a_key_of_the_file_without_effect():
    assert load_recipe("neko", {"eval_every": 0}).patience == 0
    assert load_recipe("memorize", {"forget_rows": 4}).retain_rows == 16  # a bound that nothing reaches
    assert load_recipe("neko", {"epochs": 3.0, "max_steps": 5}).max_steps == 5  # both were given: it ends there
    assert load_recipe("neko", {"forget_objective": "npo"}).forget_reduction == "tokens"  # base.toml's, without effect
    assert load_recipe("npo", {"forget_reduction": "rows"}) == load_recipe("npo")


def test_recipes_inherit(tmp_path):
    (tmp_path / "parent.toml").write_text('base = "simnpo"\nsummary = "p"\nbeta = 4.0\nlr = 1e-3\n')
    (tmp_path / "child.toml").write_text('base = "parent.toml"\nlr = 1e-2\n')
    (tmp_path / "other.toml").write_text('base = "parent.toml"\nforget_objective = "npo"\n')
    parent, child, other = (load_recipe(tmp_path / f"{name}.toml") for name in ("parent", "child", "other"))
    assert parent.hyperparameters == {"beta": 4.0, "gamma": 0.0} and parent.max_steps == load_recipe("simnpo").max_steps
    assert (child.name, child.summary, child.lr, child.hyperparameters) == ("child", "", 1e-2, parent.hyperparameters)
    # Another objective starts from its own defaults: beta = 4 was not meant for it.
    assert (other.lr, other.hyperparameters) == (1e-3, {"beta": 0.1})
    assert load_recipe(tmp_path / "parent.toml", {"forget_objective": "wga"}).hyperparameters == {"beta": 1.0}


def test_a_base_that_does_not_exist_or_loops_is_named(tmp_path):
    for name, base in (("a", "b.toml"), ("b", "c.toml"), ("c", "a.toml"), ("d", "missing.toml"), ("e", "calibratd")):
        (tmp_path / f"{name}.toml").write_text(f'base = "{base}"\n')
    with pytest.raises(NekoLeanError, match="inherits from this file itself"):
        load_recipe(tmp_path / "a.toml")
    with pytest.raises(NekoLeanError, match=r"missing\.toml does not exist"):
        load_recipe(tmp_path / "d.toml")
    with pytest.raises(NekoLeanError, match="did you mean 'calibrated'"):
        load_recipe(tmp_path / "e.toml")


def test_values_are_flat_and_load_again(tmp_path):
    for name in recipe_names():
        recipe = load_recipe(name)
        values = {key: value for key, value in recipe.values().items() if key != "name" and has_effect(key, recipe)}
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        (tmp_path / f"{name}.toml").write_text(text)
        assert load_recipe(tmp_path / f"{name}.toml") == recipe


@pytest.mark.parametrize("max_steps", [0, 7])
@pytest.mark.parametrize("epochs", [0.0, 0.3, 2.0])
def test_every_combination_makes_steps_or_is_refused(max_steps, epochs):
    """Of objectives, order, substitute and length: what loads has steps, and each of them has rows."""
    ran = 0
    for forget, retain, order, substitute in itertools.product(
        ("none", *FORGET_OBJECTIVES), ("none", *RETAIN_OBJECTIVES), STEP_ORDERS, SUBSTITUTES
    ):
        change = {"forget_objective": forget, "retain_objective": retain, "order": order, "substitute": substitute}
        change |= {"max_steps": max_steps, "eval_every": 0}
        change |= {"gamma": 2.0} if forget in ("simnpo", "undial") else {}
        change |= {"substitute_weight": 1.0} if substitute != "none" else {}
        change |= {"epochs": epochs} if not max_steps or order == "chunks" else {}
        try:
            recipe = load_recipe("neko", change)
        except NekoLeanError as error:
            assert "\n" not in str(error)
            continue
        sets = [20] * 9 if forget != "none" or substitute != "none" else [], [20] * 5 if retain != "none" else []
        rng = random.Random(0)
        found = phases(recipe, *sets, rng)
        assert sum(phase.steps for phase in found) > 0, change
        for phase in found:
            for _, rows in zip(range(phase.steps), batches(recipe, phase, *sets, rng), strict=False):
                assert any(rows), change
        ran += 1
    assert ran or (not max_steps and not epochs)


def test_reductions_apply_where_the_objective_takes_them():
    for name, reduction in itertools.product(("neko", "wga", "undial", "calibrated"), REDUCTIONS):
        assert load_recipe(name, {"forget_reduction": reduction}).forget_reduction == reduction


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("lr=" + "[" * 5000, "not readable TOML"),
        ("lr=" + "9" * 5000, "not readable TOML"),
        ("lr=" + "9" * 400, "must be of type float"),
        ("lr=inf", "must be finite"),
        ("lr=nan", "must be finite"),
    ],
)
def test_values_that_are_no_numbers_end_in_a_sentence(text, match):
    with pytest.raises(NekoLeanError, match=match):
        load_recipe("neko", dict([parse_override(text)]))


def test_a_recipe_file_of_any_bytes_ends_in_a_sentence(tmp_path):
    for number, data in enumerate([b"\xff\xfe", b"lr = " + b"[" * 5000, b"lr = " + b"9" * 5000, b"lr = "]):
        path = tmp_path / f"{number}.toml"
        path.write_bytes(data)
        with pytest.raises(NekoLeanError, match="not readable TOML"):
            load_recipe(path)


def test_an_eos_that_the_cache_lacks_is_refused_before_the_teacher_runs():
    with pytest.raises(NekoLeanError, match="append_eos = true does not work with a teacher"):
        load_recipe("neko", {"append_eos": True})
    assert load_recipe("graddiff", {"append_eos": True}).append_eos
