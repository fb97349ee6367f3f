"""Recipes: the shipped ones, overrides, and what is refused."""

import itertools
import random
import tomllib

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.objectives.losses import FORGET, REDUCTIONS, RETAIN
from neko_lean.recipes import (
    FOLDER,
    ORDERS,
    ROW_MEANS,
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


def test_no_shipped_file_states_a_key_without_effect():
    for name in recipe_names():
        recipe = load_recipe(name)
        stated = tomllib.loads((FOLDER / f"{name}.toml").read_text())
        assert [key for key in stated if not has_effect(key, recipe)] == [], name


@pytest.mark.parametrize(
    ("name", "override"),
    [("neko", {"beta": 0.1}), ("neko", {"gamma": 0.0}), ("neko", {"level": 5.0}), ("neko", {"chunk_rows": 8}),
     ("neko", {"substitute_weight": 0.5}), ("neko", {"epochs": 3.0}), ("npo", {"gamma": 1.0}), ("npo", {"level": 1.0}),
     ("npo", {"patience": 2}), ("undial", {"beta": 1.0}), ("calibrated", {"beta": 1.0}),
     ("idk", {"forget_weight": 1.0}), ("idk", {"answer_skip": 1}), ("idk", {"forget_span": "all"}),
     ("idk", {"forget_reduction": "tokens"}), ("memorize", {"forget_weight": 1.0}),
     ("neko", {"answer_skip": 1, "forget_span": "all"}),
     ("graddiff", {"retain_objective": "none", "retain_weight": 2.0}),
     *[(name, {"forget_reduction": one}) for name in ROW_MEANS for one in ("tokens", "positions")]],
)  # fmt: skip
def test_a_key_without_effect_is_refused(name, override, tmp_path):
    with pytest.raises(NekoLeanError, match="has no effect"):
        load_recipe(name, override)
    # In a file of the user's as well, unless it is a value by which older files claim nothing.
    lines = {**tomllib.loads((FOLDER / f"{name}.toml").read_text()), **override}
    text = "".join(f"{key} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for key, v in lines.items())
    (tmp_path / "mine.toml").write_text(text)
    if "gamma" in override or "patience" in override or next(iter(override)) in ("beta", "level", "chunk_rows"):
        with pytest.raises(NekoLeanError, match="has no effect"):
            load_recipe(tmp_path / "mine.toml")


def test_an_override_may_leave_a_key_of_the_file_without_effect():
    assert load_recipe("neko", {"eval_every": 0}).patience == 0
    assert load_recipe("memorize", {"forget_rows": 4}).retain_rows == 16  # a bound that nothing reaches
    assert load_recipe("neko", {"epochs": 3.0, "max_steps": 5}).max_steps == 5  # both were given: it ends there
    assert load_recipe("neko", {"forget_objective": "npo"}).forget_reduction == "rows"
    assert load_recipe("npo", {"forget_reduction": "rows"}).forget_reduction == "rows"
    with pytest.raises(NekoLeanError, match="lacks forget_weight"):
        load_recipe("idk", {"forget_objective": "ga"})


def test_an_older_file_with_every_key_still_loads(tmp_path):
    old = {"eval_rows": 32, "patience": 0, "epochs": 0.0, "forget_reduction": "rows"}
    text = (FOLDER / "npo.toml").read_text() + "".join(f"{key} = {value!r}\n" for key, value in old.items())
    (tmp_path / "npo.toml").write_text(text)
    assert load_recipe(tmp_path / "npo.toml") == load_recipe("npo")


@pytest.mark.parametrize("max_steps", [0, 7])
@pytest.mark.parametrize("epochs", [0.0, 0.3, 2.0])
def test_every_combination_makes_steps_or_is_refused(max_steps, epochs):
    """Of objectives, order, substitute and length: what loads has steps, and each of them has rows."""
    ran = 0
    for forget, retain, order, substitute in itertools.product(FORGET, RETAIN, ORDERS, SUBSTITUTES):
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
        ("lr=" + "9" * 400, "must be a float"),
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
    with pytest.raises(NekoLeanError, match="append_eos=true does not go with a teacher"):
        load_recipe("neko", {"append_eos": True})
    assert load_recipe("graddiff", {"append_eos": True}).append_eos
