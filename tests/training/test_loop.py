"""The training loop: what a run writes, when it stops, and which weights it returns."""

import json

import pytest
import torch

import neko_lean
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_tokenizer
from neko_lean.options import RunOptions
from neko_lean.training import trainer
from tests.helpers import flat
from tests.training.run_files import FAST, equal_weights, metrics, weights


@pytest.fixture(scope="module")
def unlearned(world, model, cache, tmp_path_factory):
    """Output and run.json of a short run with seed 0."""
    out = tmp_path_factory.mktemp("unlearned") / "out"
    run = neko_lean.unlearn(
        model, out, forget=world, retain=world, cache=cache, recipe="neko", overrides=FAST, run=RunOptions(quiet=True)
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
    assert written["measured_peak"] > 0 and written["wall_seconds"] > 0
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


@pytest.mark.parametrize(("level", "forgotten_at"), [(0.5, 2), (50.0, None)])
def test_a_run_ends_once_the_forget_set_is_forgotten(world, model, cache, tmp_path, capsys, level, forgotten_at):
    """A random model's loss is above a low level from the start, and never reaches a high one."""
    change = {**FAST, "format": "neko", "max_length": 128, "level": level, "stop": "forgotten", "eval_every": 2}
    run = neko_lean.unlearn(
        model, tmp_path / "out", forget=world, retain=world, cache=cache, recipe="calibrated",
        overrides={**change, "max_steps": 12}, run=RunOptions(quiet=True),
    )  # fmt: skip
    lines = metrics(tmp_path / "out")
    assert run["forgotten_step"] == forgotten_at and run["weights_of_step"] == run["steps"] == len(lines)
    assert run["steps"] == (3 if forgotten_at else 12)
    assert ("forgotten at step 2" in run["ended"]) == bool(forgotten_at)
    assert ("forgotten only to" in capsys.readouterr().err) == (not forgotten_at)
    assert lines[-1]["lr"] < lines[0]["lr"] == 1e-3
    shares = [line["eval_forgotten"] for line in lines if "eval_forgotten" in line]
    assert all(share == 1 for share in shares) if forgotten_at else all(0 < share < 0.95 for share in shares)


@pytest.mark.parametrize(
    ("exact", "ends_after", "warning"),
    [
        ({0: 0.8, 2: 0.4, 4: 0.77, 6: 0.8}, 4, ""),
        (
            {0: 0.8, 2: 0.4, 4: 0.75, 6: 0.75, 7: 0.75},
            6,
            "75% of the retain answers retained, of 80% before: raise max_steps",
        ),
        ({0: None, 2: None, 4: None, 6: None}, 2, ""),
    ],
)
def test_a_run_goes_on_until_the_retain_answers_are_back(
    world, model, cache, tmp_path, capsys, monkeypatch, exact, ends_after, warning
):
    """Evaluations that find everything forgotten, and `exact` of the retain answers, by step."""

    def evaluate(trainer, sample):
        answers = exact[trainer.state.step]
        values = {"eval_loss": 1.0, "eval_quality": 0.5, "eval_forgotten": 1.0}
        return values if answers is None else {**values, "eval_retain_exact": answers}

    monkeypatch.setattr(trainer.Trainer, "evaluate", evaluate)
    change = {**FAST, "format": "neko", "max_length": 128, "stop": "forgotten", "eval_every": 2, "max_steps": 7}
    run = neko_lean.unlearn(
        model, tmp_path / "out", forget=world, retain=world, cache=cache, recipe="calibrated", overrides=change,
        run=RunOptions(quiet=True),
    )  # fmt: skip
    assert run["forgotten_step"] == (None if warning else ends_after)
    assert run["steps"] == (7 if warning else ends_after + 1)
    assert warning in (printed := capsys.readouterr().err) and ("raise max_steps" in printed) == bool(warning)


def test_a_run_that_ends_before_its_first_evaluation_says_what_is_missing(world, model, cache, tmp_path, capsys):
    change = {**FAST, "format": "neko", "max_length": 128, "level": 50.0, "stop": "forgotten", "eval_every": 20}
    neko_lean.unlearn(
        model, tmp_path / "out", forget=world, retain=world, cache=cache, recipe="calibrated",
        overrides={**change, "max_steps": 3}, run=RunOptions(quiet=True),
    )  # fmt: skip
    first, second, last = metrics(tmp_path / "out")
    assert 0 < last["eval_forgotten"] < 0.95 and "eval_forgotten" not in first | second
    assert f"forgotten only to {last['eval_forgotten']:.0%}" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_weights(unlearn, unlearned, tmp_path):
    for seed, equal in ((0, True), (1, False)):
        out = tmp_path / str(seed)
        unlearn(out, FAST, seed=seed)
        assert equal_weights(weights(out), weights(unlearned[0])) == equal


def spoil(monkeypatch, at, values):
    """Make the loss of training step `at` NaN, and set the losses of evaluations to `values`."""
    original, state = trainer.batch_losses, {"step": 0, "evaluation": 0}

    def spoiled(*arguments):
        losses = original(*arguments)
        if torch.is_grad_enabled():
            state["step"] += 1
            if state["step"] == at:
                losses["loss"] = losses["loss"] * torch.nan
        elif values:
            losses["loss"] = torch.tensor(values[state["evaluation"]])
            state["evaluation"] += 1
        return losses

    monkeypatch.setattr(trainer, "batch_losses", spoiled)


def test_a_non_finite_loss_stops_before_the_update_and_keeps_the_best_checkpoint(
    world, model, cache, tmp_path, monkeypatch
):
    options = {"cache": cache, "recipe": "neko", "overrides": FAST, "quiet": True}
    flat(neko_lean.unlearn)(
        model, tmp_path / "four", forget=world, retain=world, **{**options, "overrides": {**FAST, "max_steps": 6}}
    )
    spoil(monkeypatch, 6, None)
    with pytest.raises(NekoLeanError, match=r"step 6, before its update; .* holds the checkpoint of step"):
        flat(neko_lean.unlearn)(model, tmp_path / "out", forget=world, retain=world, **options)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["weights_of_step"] in (2, 4) and run["steps"] == 5 and "nan" in run["failure"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "out").values())
    spoil(monkeypatch, 1, None)
    with pytest.raises(NekoLeanError, match="nothing was written"):
        flat(neko_lean.unlearn)(model, tmp_path / "none", forget=world, retain=world, **options)
    assert not (tmp_path / "none").exists()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_early_stopping_takes_the_best_evaluation(unlearn, tmp_path, monkeypatch):
    change = {**FAST, "max_steps": 50, "eval_every": 1, "patience": 2}
    spoil(monkeypatch, 0, [5.0, 3.0, 4.0, 3.5, 1.0])
    run = unlearn(tmp_path / "out", change, seed=0)
    assert run["steps"] == 4 and run["weights_of_step"] == 2 and run["ended"].startswith("early stopping at step 4")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_each_chunk_has_its_own_schedule(world, model, tmp_path):
    """The learning rate starts at its maximum in each chunk."""
    change = {"chunk_rows": 12, "epochs": 1.0, "forget_rows": 4}
    neko_lean.unlearn(
        model,
        tmp_path / "out",
        forget=world,
        retain=world,
        recipe="sequential",
        overrides=change,
        run=RunOptions(quiet=True),
    )
    rates = [line["lr"] for line in metrics(tmp_path / "out")]
    assert rates == pytest.approx([1e-4, 2e-4 / 3, 1e-4 / 3] * 2)


@pytest.mark.slow
def test_the_best_checkpoint_by_quality_becomes_the_output(unlearn, tmp_path):
    """The run ruins the model after a while, so its output is an earlier evaluation."""
    change = {**FAST, "max_steps": 12, "lr": 2e-2, "choose": "quality", "eval_every": 3}
    run = unlearn(tmp_path / "out", change, seed=0)
    evaluations = {line["step"]: line for line in metrics(tmp_path / "out") if "eval_quality" in line}
    best = max(evaluations, key=lambda step: evaluations[step]["eval_quality"])
    assert run["weights_of_step"] == best < 12
    assert {"eval_retain_kl", "eval_forget_exact", "eval_forget_nll", "eval_retain_exact"} <= set(evaluations[3])
    short = {**change, "max_steps": 12, "choose": "last"}
    unlearn(tmp_path / "last", short, seed=0)
    assert not equal_weights(weights(tmp_path / "out"), weights(tmp_path / "last"))
