"""Losses and gradients that are not finite."""

import json

import pytest
import torch

from neko_lean.errors import NekoLeanError
from neko_lean.training import optimizer as optim
from neko_lean.training import trainer
from tests.checkpoints.interrupted import EVALUATED, save_of, saved
from tests.helpers import SMALL, model_weights

pytestmark = pytest.mark.slow  # each test is one or more whole runs


def spoil(monkeypatch, at, words):
    """Let the gradient of parameters whose name contains `words` be infinite at step `at`."""
    original = optim.refuse_non_finite
    seen = []

    def spoiled(name, gradient):
        if words in name:
            seen.append(name)
            if len(seen) == at:
                gradient.view(-1)[3] = torch.inf
        original(name, gradient)

    monkeypatch.setattr(optim, "refuse_non_finite", spoiled)


@pytest.mark.parametrize("backward", ["layerwise", "checkpointed", "plain"])
@pytest.mark.parametrize("fallback", ["best", "save", "nothing"])
def test_a_non_finite_gradient_leaves_no_partial_update_in_the_output(
    unlearn, tmp_path, monkeypatch, backward, fallback
):
    """The embedding's gradient is the last one; all other weights have been updated by then."""
    change = {**(EVALUATED if fallback == "best" else SMALL), "backward": backward}
    out = tmp_path / "out"
    expected = save_of(unlearn, tmp_path / "whole", 4, change)
    spoil(monkeypatch, 6, "embed_tokens")
    every = 0 if fallback == "nothing" else 2
    end = {"best": "holds the checkpoint of step", "save": "holds the checkpoint of step 4", "nothing": "was written"}
    message = rf"gradient of .*embed_tokens.* is not finite at step 6, in the middle of its update; .*{end[fallback]}"
    with pytest.raises(NekoLeanError, match=message):
        unlearn(out, change, save_every=every)
    assert not saved(out).exists()
    if fallback == "nothing":
        assert not out.exists()
        return
    run = json.loads((out / "run.json").read_text())
    final = model_weights(out)
    assert run["weights_of_step"] in ((2, 4) if fallback == "best" else (4,)) and run["steps"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in final.values())
    if run["weights_of_step"] == 4:
        assert all(torch.equal(final[name], tensor) for name, tensor in expected.items())


def test_gradients_of_the_loss_are_checked_before_any_update(unlearn, tmp_path, monkeypatch):
    original, count, touched = trainer.batch_losses, [0], []

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    def spoiled(hidden, *arguments):
        count[0] += 1
        return original(Infinite.apply(hidden) if count[0] == 3 else hidden, *arguments)

    update = optim.InBackwardAdam8bit.update
    monkeypatch.setattr(trainer, "batch_losses", spoiled)
    monkeypatch.setattr(optim.InBackwardAdam8bit, "update", lambda *a: touched.append(count[0]) or update(*a))
    with pytest.raises(NekoLeanError, match="last layer's output is not finite at step 3, before its update"):
        unlearn(tmp_path / "out")
    assert set(touched) == {1, 2}
