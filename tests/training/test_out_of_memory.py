"""CUDA out of memory: steps are retried in smaller pieces, and partial updates are undone."""

import importlib

import pytest
import torch

from neko_lean.data.examples import EncodedExample, Example
from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.recipe import load_recipe
from neko_lean.training import layerwise, loop, trainer
from neko_lean.training.examples import TrainingExamples
from neko_lean.training.out_of_memory import MIN_HEAD_ROWS
from tests.checkpoints.interrupted import EVALUATED, Killed, kill_at, metrics, result, steps_saved
from tests.helpers import SMALL, model_weights, tiny

pytestmark = pytest.mark.slow  # each test is one or more whole runs

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fail(monkeypatch, owner, name, calls, before=lambda *_: None):
    """Let some calls of a function, counted from 1, run out of memory."""
    original, count = getattr(owner, name), [0]

    def failing(*arguments, **named):
        count[0] += 1
        if count[0] in calls:
            before(*arguments)
            raise MEMORY
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, failing)


class NoRoom(torch.autograd.Function):
    """The identity, whose backward pass runs out of memory."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MEMORY


def test_out_of_memory_in_forward_makes_the_pieces_smaller(unlearn, tmp_path, monkeypatch, capsys):
    fail(monkeypatch, trainer, "batch_losses", {3, 4, 5, 9})
    head_chunks = []
    monkeypatch.setattr(loop.Loop, "_evaluate", lambda self: head_chunks.append(self.state.head_chunk) or {})
    run = unlearn(tmp_path / "out", {**SMALL, "eval_every": 1})
    warnings = [line for line in capsys.readouterr().err.splitlines() if "CUDA out of memory" in line]
    assert len(warnings) == 4 and "in step 3; retrying with the head in chunks of" in warnings[0]
    assert all("micro-batches of at most" in line for line in warnings[1:])
    assert run["steps"] == 10 and run["ended"] == "all steps taken"
    assert run["recipe"]["micro_tokens"] < load_recipe("neko").micro_tokens
    assert head_chunks[1] is None and head_chunks[2] > 0
    whole = tmp_path / "whole"
    monkeypatch.undo()
    unlearn(whole)
    for actual, expected in zip(metrics(tmp_path / "out"), metrics(whole), strict=True):
        for key in ("step", "rows", "tokens", "lr"):  # each step takes the same examples
            assert actual[key] == expected[key]
        assert actual["loss"] == pytest.approx(expected["loss"], rel=0.05)


@pytest.mark.parametrize("backward", ["layerwise", "checkpointed", "plain"])
def test_out_of_memory_before_the_first_update_is_retried(unlearn, tmp_path, monkeypatch, capsys, backward, no_gpu):
    """In float32 on a CPU, smaller pieces change only the order of summation."""
    change = {**SMALL, "dtype": "float32", "backward": backward}
    unlearn(tmp_path / "whole", change)
    original, count = trainer.batch_losses, [0]

    def failing(*arguments):
        count[0] += 1
        losses = original(*arguments)
        return {**losses, "loss": NoRoom.apply(losses["loss"])} if count[0] == 3 else losses

    monkeypatch.setattr(trainer, "batch_losses", failing)
    unlearn(tmp_path / "out", change)
    assert capsys.readouterr().err.count("CUDA out of memory in step 3") == 1
    actual, expected = model_weights(tmp_path / "out"), model_weights(tmp_path / "whole")
    difference = max((actual[name] - expected[name]).abs().max().item() for name in actual)
    assert difference < 1e-3 and len(metrics(tmp_path / "out")) == 10


def update_the_head(layer_pass, update):
    update(layer_pass.lm.head)  # now only the head has been updated


@pytest.mark.parametrize("every", [2, 0])
def test_retain_answers_before_the_first_step_are_remembered(unlearn, tmp_path, monkeypatch, every):
    """Even if a step that ran out of memory is undone, with a save or from the beginning."""
    compared = []
    values = {"eval_loss": 1.0, "eval_quality": 0.5, "eval_forgotten": 1.0, "eval_retain_exact": 0.8}
    monkeypatch.setattr(trainer.Trainer, "evaluate", lambda *_: values)
    monkeypatch.setattr(loop, "is_retained", lambda evaluated, before: compared.append(before))
    fail(monkeypatch, layerwise.LayerPass, "backward", {4}, update_the_head)
    change = {**SMALL, "max_steps": 6, "eval_every": 1, "format": "neko"}
    unlearn(tmp_path / "out", change, recipe="calibrated", save_every=every)
    assert len(compared) >= 6 and set(compared) == {0.8}


@pytest.mark.parametrize("every", [2, 0])
def test_out_of_memory_during_updates_restores_the_last_save(unlearn, tmp_path, monkeypatch, capsys, every):
    """Without saves it starts from the beginning. A run that is killed later resumes to the same bytes."""

    def run(out, **options):
        with monkeypatch.context() as patch:
            # The first call verifies the layers before training.
            fail(patch, layerwise.LayerPass, "backward", {7}, update_the_head)
            return unlearn(out, save_every=every, **options)

    first = run(tmp_path / "out")
    err = capsys.readouterr().err
    assert "CUDA out of memory in step 6; retrying with the head in chunks of" in err
    assert first["steps"] == 10 and [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 11))
    if not every:
        # It equals a run that uses the smaller pieces from the beginning.
        original = trainer.Trainer.load_state

        def smaller(self, state):
            state.head_chunk = int(err.split("chunks of ")[1].split()[0])
            original(self, state)

        monkeypatch.setattr(trainer.Trainer, "load_state", smaller)
        unlearn(tmp_path / "small")
        assert result(tmp_path / "small") == result(tmp_path / "out")
        return
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 8)
        run(tmp_path / "two")
    unlearn(tmp_path / "two", resume=True)
    assert result(tmp_path / "two") == result(tmp_path / "out")


def test_an_example_that_does_not_fit_ends_the_run_and_keeps_the_save(unlearn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail(patch, trainer, "batch_losses", set(range(4, 1000)))
        with pytest.raises(NekoLeanError, match=r"a single example.*as of step 2: continue with --resume\.$"):
            unlearn(out, save_every=2)
    assert steps_saved(out) == [2] and not out.exists()
    # An option that saves memory may be given on resume.
    assert unlearn(out, {**SMALL, "offload_activations": True}, resume=True)["steps"] == 10
    assert MIN_HEAD_ROWS > 1


def test_out_of_memory_in_an_evaluation_or_while_loading(unlearn, tmp_path, monkeypatch):
    fail(monkeypatch, trainer, "answer_metrics", {1, 2, 5})
    run = unlearn(tmp_path / "out", EVALUATED)
    assert run["steps"] == 10 and sum("eval_quality" in line for line in metrics(tmp_path / "out")) == 5
    fail(monkeypatch, importlib.import_module("neko_lean.runs.unlearning"), "load_model", {1})
    with pytest.raises(NekoLeanError, match="does not hold the model and Adam's state"):
        unlearn(tmp_path / "no")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.cuda
def test_a_step_continues_in_smaller_pieces_on_a_gpu_with_too_little_memory(gpu, capsys):
    """The step gets 0.7 of what it reserves without a limit, most of it for the head's chunk of logits."""
    lm = tiny("Llama", dtype=torch.float32, vocab_size=8192, max_position_embeddings=512)
    lm.model.to(gpu)
    lm = as_causal_lm(lm.model)
    ids = torch.randint(3, 8192, (16, 512), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [EncodedExample(Example(f"r{n}", "a", "b", "t"), row, 1, 0) for n, row in enumerate(ids)]
    changes = {"dtype": "float32", "retain_rows": 16, "micro_tokens": 1024, "max_length": 512}
    recipe = load_recipe("memorize", changes)
    start = {name: p.detach().clone() for name, p in lm.model.named_parameters()}

    def take_step(share=None):
        with torch.no_grad():
            for name, p in lm.model.named_parameters():
                p.copy_(start[name])
        one = trainer.Trainer(lm, 0, TrainingExamples(retain=examples), None, recipe)
        optimizer = one.new_optimizer(0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        if share is not None:
            limit = before + share * reserved
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(gpu).total_memory)
        indices = ((), range(16))
        _, losses = one.step(optimizer, 1e-3, indices, one.batch(indices))
        used = torch.cuda.max_memory_reserved() - before
        return one, losses["loss"], [p.detach().cpu() for p in lm.model.parameters()], used

    whole, loss, weights, reserved = take_step()
    assert whole.state.head_chunk is None and not capsys.readouterr().err

    try:
        smaller, loss_in_pieces, weights_in_pieces, _ = take_step(0.7)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert smaller.state.head_chunk > 0 and "CUDA out of memory in step 1; retrying with" in capsys.readouterr().err
    assert loss_in_pieces == pytest.approx(loss, rel=1e-4)
    for one, other in zip(weights, weights_in_pieces, strict=True):
        assert (one - other).abs().mean() < 1e-4  # a tenth of lr; Adam's first step moves every weight by lr
