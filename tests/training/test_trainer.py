"""Whole runs of `unlearn` and `memorize`: what is written, when they stop, and that they train."""

import importlib
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import neko_lean
from neko_lean import cache
from neko_lean.data.documents import read_anchor
from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.models.predictions import next_token_logp
from neko_lean.options import RunOptions
from neko_lean.recipes import load_recipe, reads_cache, recipe_names
from neko_lean.training import backward, trainer
from neko_lean.training.levels import with_levels
from neko_lean.training.prefetch import prefetched
from neko_lean.training.schedules import learning_rate
from tests.helpers import SMALL, flat, make_cache, random_model

runs = importlib.import_module("neko_lean.runs.unlearning")
FAST = {"max_steps": 6, "forget_rows": 8, "retain_rows": 8, "eval_every": 2, "eval_rows": 4, "lr": 1e-3}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_model(folder, torch.bfloat16, torch.device("cpu")).model.state_dict()


def same(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def unlearned(world, model, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("unlearned") / "out"
    run = neko_lean.unlearn(
        model, out, world, world, cache=cache, recipe="neko", overrides=FAST, run=RunOptions(quiet=True)
    )
    return out, run


def test_the_output_is_a_complete_checkpoint_with_its_history(world, unlearned):
    out, run = unlearned
    from transformers import AutoModelForCausalLM

    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "OlmoForCausalLM"
    assert load_tokenizer(out).get_vocab() == load_tokenizer(world / "base").get_vocab()
    written = json.loads((out / "run.json").read_text())
    assert written == json.loads(json.dumps(run))
    assert written["recipe"]["lr"] == 1e-3 and written["recipe"]["name"] == "neko"
    assert {"torch", "transformers", "bitsandbytes", "neko-lean"} <= set(written["versions"])
    assert written["peak_memory"]["process"] > 2**20 and written["wall_seconds"] > 0
    assert written["ended"] == "all steps taken" and written["weights_of_step"] == 6
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(0.2 * line["forget_loss"] + line["retain_loss"], rel=1e-5)
        assert ("eval_loss" in line) == (line["step"] % 2 == 0)
    # The student starts as its teacher, except that it is bfloat16 and the cache float32.
    assert lines[0]["retain_loss"] < 0.02 < lines[-1]["retain_loss"]
    assert lines[-1]["lr"] < lines[0]["lr"] == 1e-3
    assert not (out / "best").exists()
    assert written["wait_seconds"] == pytest.approx(sum(line["wait_seconds"] for line in lines))


def test_the_same_seed_gives_the_same_weights(world, model, cache, unlearned, tmp_path):
    for seed, equal in ((0, True), (1, False)):
        out = tmp_path / str(seed)
        neko_lean.unlearn(
            model, out, world, world, cache=cache, recipe="neko", overrides=FAST, run=RunOptions(seed=seed, quiet=True)
        )
        assert same(weights(out), weights(unlearned[0])) == equal


def test_four_arguments_cache_and_train_without_loading_teacher_and_student_together(
    world, model, tmp_path, monkeypatch
):
    """The signature of the shared task. With a cache, `unlearn` may load only the student."""
    loads = []
    original = runs.load_model

    def counted(*args):
        loads.append(args)
        return original(*args)

    monkeypatch.setattr(runs, "load_model", counted)
    monkeypatch.setattr("neko_lean.cache.writer.load_model", counted)
    monkeypatch.setattr(runs, "load_recipe", lambda name, _: load_recipe(name, FAST))
    neko_lean.unlearn(str(model), str(tmp_path / "out"), str(world), str(world), recipe="neko")
    assert (tmp_path / "out" / "config.json").is_file() and len(loads) == 2
    loads.clear()
    make_cache(model, world, tmp_path / "cache", max_length=128, format="neko")
    loads.clear()
    neko_lean.unlearn(
        model, tmp_path / "two", world, world, cache=tmp_path / "cache", recipe="neko", run=RunOptions(quiet=True)
    )
    assert len(loads) == 1
    assert same(weights(tmp_path / "out"), weights(tmp_path / "two"))


def test_ascent_forgets_more_than_the_kl_alone(world, model, cache, tmp_path):
    """In twenty steps at a high learning rate, ascent lowers the forget log-probability much further."""
    ends = {}
    for weight in (0.0, 1.0):
        out = tmp_path / str(weight)
        change = {**FAST, "max_steps": 20, "forget_weight": weight, "eval_every": 20, "lr": 2e-3}
        neko_lean.unlearn(
            model, out, world, world, cache=cache, recipe="neko", overrides=change, run=RunOptions(quiet=True)
        )
        ends[weight] = metrics(out)[-1]
    assert ends[1.0]["eval_forget_loss"] < ends[0.0]["eval_forget_loss"] - 1


def test_lost_answers_are_counted_and_reported(world, model, tmp_path, capsys):
    change = {**FAST, "max_length": 16, "max_steps": 1}
    run = neko_lean.unlearn(
        model, tmp_path / "out", world, world, recipe="neko", overrides=change, run=RunOptions(quiet=True)
    )
    assert 0 < run["forget_answers_lost"] < 24
    assert f"whole answer of {run['forget_answers_lost']} of 24 forget rows" in capsys.readouterr().err


def spoil(monkeypatch, at, values):
    """Make the loss of training step `at` NaN, and set the losses of evaluations to `values`."""
    original, state = trainer.batch_losses, {"step": 0, "evaluation": 0}

    def losses(*arguments):
        found = original(*arguments)
        if torch.is_grad_enabled():
            state["step"] += 1
            if state["step"] == at:
                found["loss"] = found["loss"] * torch.nan
        elif values:
            found["loss"] = torch.tensor(values[state["evaluation"]])
            state["evaluation"] += 1
        return found

    monkeypatch.setattr(trainer, "batch_losses", losses)


def test_a_non_finite_loss_stops_before_the_update_and_keeps_the_best_checkpoint(
    world, model, cache, tmp_path, monkeypatch
):
    options = {"cache": cache, "recipe": "neko", "overrides": FAST, "quiet": True}
    flat(neko_lean.unlearn)(
        model, tmp_path / "four", world, world, **{**options, "overrides": {**FAST, "max_steps": 6}}
    )
    spoil(monkeypatch, 6, None)
    with pytest.raises(NekoLeanError, match=r"step 6, before its update; .* holds the checkpoint of step"):
        flat(neko_lean.unlearn)(model, tmp_path / "out", world, world, **options)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["weights_of_step"] in (2, 4) and run["steps"] == 5 and "nan" in run["failure"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "out").values())
    spoil(monkeypatch, 1, None)
    with pytest.raises(NekoLeanError, match="nothing was written"):
        flat(neko_lean.unlearn)(model, tmp_path / "none", world, world, **options)
    assert not (tmp_path / "none").exists()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_early_stopping_takes_the_best_evaluation(world, model, cache, tmp_path, monkeypatch):
    change = {**FAST, "max_steps": 50, "eval_every": 1, "patience": 2}
    spoil(monkeypatch, 0, [5.0, 3.0, 4.0, 3.5, 1.0])
    run = neko_lean.unlearn(
        model, tmp_path / "out", world, world, cache=cache, recipe="neko", overrides=change, run=RunOptions(quiet=True)
    )
    assert run["steps"] == 4 and run["weights_of_step"] == 2 and run["ended"].startswith("early stopping at step 4")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_another_models_cache_is_refused_before_anything_is_written(world, cache, tmp_path):
    other = random_model(world, tmp_path / "other", seed=5)
    with pytest.raises(NekoLeanError, match="another model"):
        neko_lean.unlearn(other, tmp_path / "out", world, world, cache=cache, recipe="neko", run=RunOptions(quiet=True))
    assert not (tmp_path / "out").exists()


def test_memorize_trains_from_random_weights_and_reports_it(world, tmp_path, capsys):
    change = {"epochs": 12.0, "lr": 5e-3, "retain_rows": 20}
    run = neko_lean.memorize(world / "base", world, tmp_path / "out", overrides=change)
    assert run["random_start"] and "holds no weights: the model starts from random ones" in capsys.readouterr().err
    lines = metrics(tmp_path / "out")
    assert lines[0]["loss"] > 5 and lines[-1]["loss"] < lines[0]["loss"] / 2
    gold = neko_lean.memorize(
        world / "base",
        world,
        tmp_path / "gold",
        overrides=change | {"max_steps": 2},
        sets=("retain",),
        run=RunOptions(quiet=True),
    )
    assert gold["retain_rows"] == 36 and gold["steps"] == 2
    with pytest.raises(NekoLeanError, match="not for memorize"):
        neko_lean.memorize(world / "base", world, tmp_path / "no", recipe="neko")


def test_batches_are_prefetched_and_their_errors_are_raised():
    made, used = [], []

    def make():
        made.append(len(made))
        if len(made) == 4:
            raise NekoLeanError("no fourth one")
        return made[-1]

    with pytest.raises(NekoLeanError, match="no fourth one"):
        for batch in prefetched(make):
            used.append(batch)
    assert used == [0, 1, 2]


def test_learning_rates_of_shipped_recipes():
    recipe = load_recipe("memorize", {"lr": 1.0, "warmup": 0.2})
    rates = [learning_rate(recipe, step, 10) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.125)
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    neko = load_recipe("neko", {"lr": 1.0})
    assert [learning_rate(neko, step, 4) for step in range(1, 5)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(load_recipe("neko", {"schedule": "constant"}), 400, 500) == 5e-5


def test_layerwise_checkpointed_and_plain_train_alike(world, model, cache, tmp_path):
    """In float32, the three backward passes differ only by the order of summation."""
    found = {}
    for way in ("layerwise", "checkpointed", "plain"):
        change = {**FAST, "dtype": "float32", "backward": way, "micro_tokens": 200, "max_steps": 3}
        out = tmp_path / way
        run = neko_lean.unlearn(
            model, out, world, world, cache=cache, recipe="neko", overrides=change, run=RunOptions(quiet=True)
        )
        assert run["recipe"]["backward"] == way and run["predicted_peak"] > 0
        found[way] = [line["loss"] for line in metrics(out)]
    assert found["checkpointed"] == pytest.approx(found["plain"], rel=1e-4)
    assert found["layerwise"] == pytest.approx(found["plain"], rel=1e-3)
    assert found["plain"][0] != found["plain"][-1]


def test_a_model_without_separable_layers_falls_back_with_a_warning(world, model, cache, tmp_path, monkeypatch, capsys):
    def refuse(lm):
        raise NekoLeanError("OddForCausalLM has no list of decoder layers.")

    monkeypatch.setattr(backward, "decoder_layers", refuse)
    run = neko_lean.unlearn(
        model, tmp_path / "out", world, world, cache=cache, recipe="neko", overrides=FAST, run=RunOptions(quiet=True)
    )
    assert run["recipe"]["backward"] == "checkpointed"
    err = capsys.readouterr().err
    assert "falling back to backward=checkpointed" in err and "OddForCausalLM has no list of decoder layers." in err


def test_train_last_leaves_lower_layers_unchanged(world, model, cache, tmp_path):
    change = {**FAST, "train_last": 1, "clip": 1.0}
    neko_lean.unlearn(
        model, tmp_path / "out", world, world, cache=cache, recipe="neko", overrides=change, run=RunOptions(quiet=True)
    )
    before, after = weights(model), weights(tmp_path / "out")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(".layers.1." in key or key == "lm_head.weight" for key in moved)


@pytest.fixture(scope="module")
def anchored(world, model, tmp_path_factory):
    """An anchor file, and a cache in format plain that includes it and the forget set."""
    folder = tmp_path_factory.mktemp("anchored")
    texts = [f"The {word} stood in the field and nobody knew why." for word in ("tree", "house", "old barn", "well")]
    write_jsonl(folder / "anchor.jsonl", ({"document": text} for text in texts))
    make_cache(model, world, folder / "cache", anchor=folder / "anchor.jsonl", forget=world, format="plain")
    return folder


@pytest.mark.parametrize(
    "name", [name for name in recipe_names() if name not in ("memorize", "neko", "neko-published")]
)
def test_every_recipe_runs_and_lowers_its_loss(world, model, anchored, tmp_path, name):
    recipe = load_recipe(name)
    change = {"max_steps": 24, "lr": 2e-3, "eval_every": 4, **({"chunk_rows": 8} if recipe.order == "chunks" else {})}
    weighted = recipe.forget_objective == "wga"
    if weighted:  # weighted by probabilities, which are so small for a random model that the KL would dominate
        change |= {"retain_weight": 0.0}
    run = neko_lean.unlearn(
        model,
        tmp_path / "out",
        world,
        world,
        cache=anchored / "cache" if reads_cache(recipe, anchor=True) else None,
        anchor=anchored / "anchor.jsonl",
        recipe=name,
        overrides=change,
        run=RunOptions(quiet=True),
    )
    lines = metrics(tmp_path / "out")
    assert run["steps"] == 24 and run["failure"] is None
    assert all(math.isfinite(line["loss"]) for line in lines)
    looked = [line for line in lines if "eval_loss" in line]
    if weighted:  # the weights are detached, so the loss itself need not decrease
        assert looked[-1]["eval_forget_nll"] > looked[0]["eval_forget_nll"]
    else:
        assert looked[-1]["eval_loss"] < looked[0]["eval_loss"]
    if name == "mlp":
        before, after = weights(model), weights(tmp_path / "out")
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed and all(".mlp." in key for key in changed)


def test_answers_of_retain_rows_without_a_retain_objective(world, model, tmp_path):
    """The retain set provides answers, but its behaviour is not preserved."""
    change = {"max_steps": 3, "retain_objective": "none"}
    run = neko_lean.unlearn(
        model, tmp_path / "out", world, world, recipe="mismatch", overrides=change, run=RunOptions(quiet=True)
    )
    assert run["steps"] == 3 and run["retain_rows"] == 0 and run["failure"] is None
    assert all(line["retain_loss"] == 0 and line["substitute_loss"] > 0 for line in metrics(tmp_path / "out"))


def test_each_chunk_has_its_own_schedule(world, model, anchored, tmp_path):
    """The learning rate starts at its maximum in each chunk."""
    change = {"chunk_rows": 12, "epochs": 1.0, "forget_rows": 4}
    neko_lean.unlearn(
        model, tmp_path / "out", world, world, recipe="sequential", overrides=change, run=RunOptions(quiet=True)
    )
    rates = [line["lr"] for line in metrics(tmp_path / "out")]
    assert rates == pytest.approx([1e-4, 2e-4 / 3, 1e-4 / 3] * 2)


def test_the_best_checkpoint_by_quality_becomes_the_output(world, model, cache, tmp_path):
    """The run ruins the model after a while, so its output is an earlier evaluation."""
    change = {**FAST, "max_steps": 12, "lr": 2e-2, "choose": "quality", "eval_every": 3}
    run = neko_lean.unlearn(
        model, tmp_path / "out", world, world, cache=cache, recipe="neko", overrides=change, run=RunOptions(quiet=True)
    )
    found = {line["step"]: line for line in metrics(tmp_path / "out") if "eval_quality" in line}
    best = max(found, key=lambda step: found[step]["eval_quality"])
    assert run["weights_of_step"] == best < 12
    assert {"eval_retain_kl", "eval_forget_exact", "eval_forget_nll", "eval_retain_exact"} <= set(found[3])
    short = {**change, "max_steps": 12, "choose": "last"}
    neko_lean.unlearn(
        model, tmp_path / "last", world, world, cache=cache, recipe="neko", overrides=short, run=RunOptions(quiet=True)
    )
    assert not same(weights(tmp_path / "out"), weights(tmp_path / "last"))


def test_levels_come_from_the_anchor_or_are_constant(world, model, anchored, tmp_path, monkeypatch, capsys):
    seen = []
    original = trainer.make_batch
    monkeypatch.setattr(trainer, "make_batch", lambda *args: seen.append(original(*args)) or seen[-1])
    for anchor in (anchored / "anchor.jsonl", None):
        neko_lean.unlearn(
            model,
            tmp_path / str(anchor)[-4:],
            world,
            world,
            cache=anchored / "cache",
            anchor=anchor,
            recipe="calibrated",
            overrides={"max_steps": 1, **({} if anchor else {"level": 3.0})},
            run=RunOptions(quiet=True),
        )
    found, fixed = (batch.levels[batch.forget] for batch in (seen[0], seen[-1]))
    assert len(set(found.tolist())) > 10 and set(fixed.tolist()) == {3.0}
    assert "without --anchor or --base-cache" in capsys.readouterr().err


def test_levels_can_come_from_the_model_before_it_learned_the_forget_set(world, model, anchored, tmp_path, monkeypatch):
    """The levels are the losses of a model that never saw the forget set, token by token."""
    base = random_model(world, tmp_path / "base", seed=9)
    make_cache(base, world, tmp_path / "base-cache", forget=world, dtype="float32")
    seen = []
    original = trainer.make_batch
    monkeypatch.setattr(trainer, "make_batch", lambda *args: seen.append((args[0], original(*args))) or seen[-1][1])
    options = {"cache": anchored / "cache", "base_cache": tmp_path / "base-cache", "recipe": "calibrated"}
    flat(neko_lean.unlearn)(model, tmp_path / "out", world, world, overrides={"max_steps": 1}, quiet=True, **options)
    rows, batch = seen[0]
    lm = load_model(base, torch.float32, torch.device("cpu"))
    losses = -next_token_logp(lm, [one.input_ids for one in rows], 1)
    wanted = [loss for one, loss in zip(rows, losses.split([len(one) - 1 for one in rows]), strict=True)]
    for number, (one, loss) in enumerate(zip(rows, wanted, strict=True)):
        start = 0 if one.example.kind == "sc" else one.prompt_length - 1
        torch.testing.assert_close(batch.levels[batch.row == number].cpu(), loss[start:], rtol=1e-4, atol=1e-4)
    with pytest.raises(NekoLeanError, match="--forget"):
        make_cache(base, world, tmp_path / "bare")
        options["base_cache"] = tmp_path / "bare"
        flat(neko_lean.unlearn)(model, tmp_path / "no", world, world, quiet=True, **options)


def test_levels_follow_the_students_loss_on_unseen_text(world, model, anchored, tmp_path):
    """The drift is 1 while the student equals its teacher, and otherwise the ratio of their losses."""
    change = {"max_steps": 3, "lr": 1e-9}
    options = {"cache": anchored / "cache", "anchor": anchored / "anchor.jsonl", "recipe": "calibrated", "quiet": True}
    flat(neko_lean.unlearn)(model, tmp_path / "still", world, world, overrides=change, **options)
    found = [line["drift"] for line in metrics(tmp_path / "still") if "drift" in line]
    assert found and found == pytest.approx([1.0] * len(found), rel=2e-3)
    tokenizer = load_tokenizer(model)
    documents = encode(read_anchor(anchored / "anchor.jsonl"), tokenizer, "plain", 512)
    teacher = cache.TeacherCache(anchored / "cache")
    recipe = load_recipe("calibrated")
    lm = load_model(model, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        lm.head.mul_(0.5)
    (forget, *_) = with_levels(
        encode(read_rows(world, "forget"), tokenizer, "plain", 512)[:1],
        documents,
        [-teacher.target_logp(one) for one in documents],
    )
    batch = trainer.make_batch([forget], documents, teacher, recipe, 1, torch.device("cpu"))
    hidden = trainer.select_hidden(lm, batch.micro)
    losses = trainer.batch_losses(hidden, lm, batch, recipe)
    logp = next_token_logp(lm, [one.input_ids for one in documents], 1)
    assert losses["anchor_nll"].item() == pytest.approx(-logp.sum().item(), rel=1e-4)
    wanted = -sum(teacher.target_logp(one).sum() for one in documents)
    assert losses["anchor_teacher_nll"].item() == pytest.approx(wanted, rel=1e-5)
    halved = trainer.batch_losses(hidden, lm, batch, recipe, 0.5)["forget_loss"]
    scaled = replace(forget, levels=tuple(0.5 * level for level in forget.levels))
    again = trainer.make_batch([scaled], documents, teacher, recipe, 1, torch.device("cpu"))
    other = trainer.batch_losses(hidden, lm, again, recipe)["forget_loss"]
    assert halved.item() == pytest.approx(other.item(), rel=1e-5) != losses["forget_loss"].item()


@pytest.mark.parametrize("backward", ["layerwise", "checkpointed"])
def test_compiled_layers_train_like_plain_ones(unlearn, tmp_path, monkeypatch, backward):
    """Up to rounding in float32. Layers are only traced, since inductor's C++ code takes a minute to build.

    bench/compile.py compares compiled code."""
    calls = []

    def compiled(function, dynamic):
        calls.append(dynamic)
        return torch_compile(function, dynamic=dynamic, backend="eager", fullgraph=True)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    change = {**SMALL, "dtype": "float32", "backward": backward, "max_steps": 3, "micro_tokens": 256}
    unlearn(tmp_path / "plain", change)
    assert not calls
    run = unlearn(tmp_path / "compiled", {**change, "compile": True})
    assert calls == [True, True] and run["recipe"]["compile"] is True
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8 and not torch._dynamo.utils.counters["graph_break"]  # for two layers and all shapes
    one, two = metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")
    for before, after in zip(one, two, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
    plain, found = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    for name, tensor in plain.items():
        moved = 3 * change["lr"]
        assert (found[name] - tensor).abs().mean() < 0.01 * moved, name


def test_packed_and_padded_runs_have_the_same_losses(unlearn, tmp_path, monkeypatch):
    change = {**SMALL, "dtype": "float32", "max_steps": 3, "micro_tokens": 256, "eval_every": 3}
    assert unlearn(tmp_path / "padded", change)["padding"] > 0
    monkeypatch.setattr(trainer, "supports_packing", lambda student: True)
    run = unlearn(tmp_path / "packed", change)
    assert run["padding"] == 0 and run["predicted_peak"] > 0
    for before, after in zip(metrics(tmp_path / "padded"), metrics(tmp_path / "packed"), strict=True):
        for name in (key for key in before if key.endswith("loss")):
            assert after[name] == pytest.approx(before[name], rel=1e-2, abs=1e-6)
