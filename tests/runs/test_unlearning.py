"""`unlearn`: what it loads, refuses and reports, with every shipped recipe."""

import importlib
import math

import pytest
import torch

import neko_lean
from neko_lean.errors import NekoLeanError
from neko_lean.options import RunOptions
from neko_lean.recipe import load_recipe, reads_cache, recipe_names
from tests.helpers import make_cache, random_model
from tests.training.run_files import FAST, equal_weights, metrics, weights

unlearning = importlib.import_module("neko_lean.runs.unlearning")


def test_four_arguments_cache_and_train_without_loading_teacher_and_student_together(
    world, model, tmp_path, monkeypatch
):
    """The signature of the shared task. With a cache, `unlearn` may load only the student."""
    loads = []
    original = unlearning.load_model

    def counted(*args):
        loads.append(args)
        return original(*args)

    monkeypatch.setattr(unlearning, "load_model", counted)
    monkeypatch.setattr("neko_lean.cache.writer.load_model", counted)
    monkeypatch.setattr(unlearning, "load_recipe", lambda name, _: load_recipe(name, FAST))
    neko_lean.unlearn(str(model), str(tmp_path / "out"), forget=str(world), retain=str(world), recipe="neko")
    assert (tmp_path / "out" / "config.json").is_file() and len(loads) == 2
    loads.clear()
    make_cache(model, world, tmp_path / "cache", max_length=128, format="neko")
    loads.clear()
    neko_lean.unlearn(
        model,
        tmp_path / "two",
        forget=world,
        retain=world,
        cache=tmp_path / "cache",
        recipe="neko",
        run=RunOptions(quiet=True),
    )
    assert len(loads) == 1
    assert equal_weights(weights(tmp_path / "out"), weights(tmp_path / "two"))


def test_lost_answers_are_counted_and_reported(world, model, tmp_path, capsys):
    change = {**FAST, "max_length": 16, "max_steps": 1}
    run = neko_lean.unlearn(
        model, tmp_path / "out", forget=world, retain=world, recipe="neko", overrides=change, run=RunOptions(quiet=True)
    )
    assert 0 < run["forget_answers_lost"] < 24
    assert f"warning: {run['forget_answers_lost']} of 24 forget rows get no forget loss" in capsys.readouterr().err


def test_another_models_cache_is_refused_before_anything_is_written(world, cache, tmp_path):
    other = random_model(world, tmp_path / "other", seed=5)
    with pytest.raises(NekoLeanError, match="another model"):
        neko_lean.unlearn(
            other, tmp_path / "out", forget=world, retain=world, cache=cache, recipe="neko", run=RunOptions(quiet=True)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in recipe_names() if name not in ("memorize", "neko", "neko-published")]
)
def test_every_recipe_runs_and_lowers_its_loss(world, model, anchored, tmp_path, name):
    recipe = load_recipe(name)
    change = {"max_steps": 24, "lr": 2e-3, "eval_every": 4, "dtype": "float32"}
    if recipe.order == "chunks":
        change["chunk_rows"] = 8
    if recipe.stop == "forgotten":
        change["stop"] = "steps"  # what a random model never learned counts as forgotten from the start
    base_cache = None
    if recipe.forget is not None and recipe.forget.base_top_k:
        base = random_model(world, tmp_path / "base", seed=9)
        base_cache = tmp_path / "base-cache"
        make_cache(base, world, base_cache, forget=world, dtype="float32")
    weighted = recipe.forget_objective == "wga"
    if weighted:  # weighted by probabilities, which are so small for a random model that the KL would dominate
        change |= {"retain_weight": 0.0}
    run = neko_lean.unlearn(
        model,
        tmp_path / "out",
        forget=world,
        retain=world,
        cache=anchored / "cache" if reads_cache(recipe, anchor=True) else None,
        anchor=anchored / "anchor.jsonl",
        base_cache=base_cache,
        recipe=name,
        overrides=change,
        run=RunOptions(quiet=True),
    )
    lines = metrics(tmp_path / "out")
    assert run["steps"] == 24 and run["failure"] is None
    assert all(math.isfinite(line["loss"]) for line in lines)
    evaluations = [line for line in lines if "eval_loss" in line]
    if weighted:  # the weights are detached, so the loss itself need not decrease
        assert evaluations[-1]["eval_forget_nll"] > evaluations[0]["eval_forget_nll"]
    else:
        assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    if name == "mlp":
        before, after = weights(model), weights(tmp_path / "out")
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed and all(".mlp." in key for key in changed)


def test_a_recipe_that_reads_the_base_models_cache_needs_one(world, model, tmp_path):
    with pytest.raises(NekoLeanError, match="base-kl needs --base-cache"):
        neko_lean.unlearn(
            model, tmp_path / "out", forget=world, retain=world, recipe="base-kl", run=RunOptions(quiet=True)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["undial", "edited"])
def test_a_recipe_that_reads_the_teachers_alternatives_needs_a_cache_that_holds_them(
    world, model, tmp_path, capsys, recipe
):
    """The cache of the run itself does; one with the default mass is warned of."""
    common = {"forget": world, "retain": world, "recipe": recipe, "overrides": {**FAST, "max_steps": 1}}
    neko_lean.unlearn(model, tmp_path / "own", **common, run=RunOptions(quiet=True))
    assert "mostly lacks" not in capsys.readouterr().err

    make_cache(model, world, tmp_path / "cache", mass=0.99, forget=world)
    neko_lean.unlearn(model, tmp_path / "out", **common, cache=tmp_path / "cache", run=RunOptions(quiet=True))
    assert f"{recipe} trains towards what the teacher would say instead" in capsys.readouterr().err


@pytest.mark.parametrize("substitute", ["random", "similar"])
def test_answers_of_retain_rows_without_a_retain_objective(world, model, tmp_path, substitute):
    """The retain set provides answers, but its behaviour is not preserved."""
    change = {"max_steps": 3, "retain_objective": "none", "substitute": substitute}
    run = neko_lean.unlearn(
        model,
        tmp_path / "out",
        forget=world,
        retain=world,
        recipe="mismatch",
        overrides=change,
        run=RunOptions(quiet=True),
    )
    assert run["steps"] == 3 and run["retain_rows"] == 0 and run["failure"] is None
    assert all(line["retain_loss"] == 0 and line["substitute_loss"] > 0 for line in metrics(tmp_path / "out"))


def test_similar_answers_need_retain_prompts(world, model, tmp_path):
    """Refused before the model has written anything."""
    with pytest.raises(NekoLeanError, match="without a chat template the model would write a retain set of documents"):
        neko_lean.unlearn(model, tmp_path / "out", forget=world, recipe="similar", run=RunOptions(quiet=True))
    assert list(tmp_path.iterdir()) == []
