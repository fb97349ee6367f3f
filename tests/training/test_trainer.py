"""Training steps: the backward passes agree, and frozen, compiled and packed models train as they should."""

import pytest
import torch
from safetensors.torch import load_file

from neko_lean.errors import NekoLeanError
from neko_lean.training import backward, trainer
from tests.helpers import SMALL
from tests.training.run_files import FAST, metrics, weights


@pytest.mark.slow
def test_ascent_forgets_more_than_the_kl_alone(unlearn, tmp_path):
    """In twenty steps at a high learning rate, ascent lowers the forget log-probability much further."""
    ends = {}
    for weight in (0.0, 1.0):
        out = tmp_path / str(weight)
        change = {**FAST, "max_steps": 20, "forget_weight": weight, "eval_every": 20, "lr": 2e-3}
        unlearn(out, change, seed=0)
        ends[weight] = metrics(out)[-1]
    assert ends[1.0]["eval_forget_loss"] < ends[0.0]["eval_forget_loss"] - 1


@pytest.mark.slow
def test_layerwise_checkpointed_and_plain_train_alike(unlearn, tmp_path):
    """In float32, the three backward passes differ only by the order of summation."""
    losses = {}
    for kind in ("layerwise", "checkpointed", "plain"):
        change = {**FAST, "dtype": "float32", "backward": kind, "micro_tokens": 200, "max_steps": 3}
        out = tmp_path / kind
        run = unlearn(out, change, seed=0)
        assert run["recipe"]["backward"] == kind and run["predicted_peak"] > 0
        losses[kind] = [line["loss"] for line in metrics(out)]
    assert losses["checkpointed"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["layerwise"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["plain"][0] != losses["plain"][-1]


def test_a_model_without_separable_layers_falls_back_with_a_warning(unlearn, tmp_path, monkeypatch, capsys):
    def refuse(lm):
        raise NekoLeanError("OddForCausalLM has no list of decoder layers.")

    monkeypatch.setattr(backward, "decoder_layers", refuse)
    run = unlearn(tmp_path / "out", FAST, seed=0)
    assert run["recipe"]["backward"] == "checkpointed"
    err = capsys.readouterr().err
    assert "falling back to backward=checkpointed" in err and "OddForCausalLM has no list of decoder layers." in err


def test_train_last_leaves_lower_layers_unchanged(unlearn, model, tmp_path):
    change = {**FAST, "train_last": 1, "clip": 1.0}
    unlearn(tmp_path / "out", change, seed=0)
    before, after = weights(model), weights(tmp_path / "out")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(".layers.1." in key or key == "lm_head.weight" for key in moved)


@pytest.mark.slow
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
    plain_lines, compiled_lines = metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")
    for before, after in zip(plain_lines, compiled_lines, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
    plain, compiled_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    for name, tensor in plain.items():
        moved = 3 * change["lr"]
        assert (compiled_weights[name] - tensor).abs().mean() < 0.01 * moved, name


def test_packed_and_padded_runs_have_the_same_losses(unlearn, tmp_path, monkeypatch):
    change = {**SMALL, "dtype": "float32", "max_steps": 3, "micro_tokens": 256, "eval_every": 3}
    assert unlearn(tmp_path / "padded", change)["padding"] > 0
    monkeypatch.setattr(trainer, "supports_packing", lambda student: True)
    run = unlearn(tmp_path / "packed", change)
    assert run["padding"] == 0 and run["predicted_peak"] > 0
    for before, after in zip(metrics(tmp_path / "padded"), metrics(tmp_path / "packed"), strict=True):
        for name in (key for key in before if key.endswith("loss")):
            assert after[name] == pytest.approx(before[name], rel=1e-2, abs=1e-6)
