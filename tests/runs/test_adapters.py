"""Runs that train LoRA adapters, with and without a quantised base: outputs, saves, resume, prediction, refusals."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from neko_lean.cli import app
from neko_lean.errors import Interrupted, NekoLeanError
from neko_lean.training.loop import Loop
from tests.helpers import SMALL, flat
from tests.torchrun import needs_new_torch, torchrun

LORA = {**SMALL, "lora_rank": 4, "lr": 2e-2}
IDS = torch.arange(3, 15)[None]


def weights(folder):
    """Weights of a checkpoint by name, as stored."""
    return {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}


def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits.detach()


@pytest.mark.parametrize("more", [{}, {"train_last": 1}, {"backward": "checkpointed"}, {"dtype": "float32"}])
def test_the_output_is_a_plain_checkpoint_in_which_only_linear_layers_changed(unlearn, model, tmp_path, more):
    run = unlearn(tmp_path / "out", {**LORA, **more})
    before, after = weights(model), weights(tmp_path / "out")
    assert before.keys() == after.keys() and not (tmp_path / "out" / "adapter").exists()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name].to(weight.dtype))}
    last = [1] if more.get("train_last") else [0, 1]
    assert changed == {name for name in after if any(f"layers.{n}." in name for n in last) and "_proj" in name}
    assert run["recipe"]["lora_rank"] == 4 and run["recipe"]["backward"] == more.get("backward", "layerwise")
    assert run["predicted_peak"] > 0


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_adapter_on_its_base_is_the_merged_checkpoint(unlearn, model, tmp_path, quantization):
    """In float32, so that only float32 rounding is between them. A quantised base is that of the run, dequantised."""
    change = {**LORA, "dtype": "float32", "quantize_base": quantization}
    unlearn(tmp_path / "out", change, save_adapter=True)
    base = tmp_path / "base"
    unlearn(base, {**change, "lr": 1e-30})  # adapters that stay zero: the base alone
    # The base as the student saw it, with the adapter from the run.
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "out" / "adapter"
    )
    expected = adapted(IDS).logits.detach()
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(base)).abs().max() > 0.1
    assert torch.allclose(logits(base), logits(model), atol=1e-4) == (quantization == "none")


@pytest.mark.parametrize("more", [{}, {"quantize_base": "nf4"}])
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(unlearn, tmp_path, monkeypatch, more):
    change = {**LORA, "eval_every": 3, "choose": "loss", **more}
    unlearn(tmp_path / "whole", change)
    original = Loop._step

    def stops_at_seven(self, *args):
        losses = original(self, *args)
        if self.state.step == 7:
            self.signals.received = 15
        return losses

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_step", stops_at_seven)
        with pytest.raises(Interrupted):
            unlearn(tmp_path / "stopped", change, save_every=2)
    saved = sorted((tmp_path / ".stopped.saved").glob("step-*"))[-1]
    stored = json.loads((saved / "manifest.json").read_text())
    assert "weights-000.safetensors" in json.dumps(stored)
    assert sum(file.stat().st_size for file in saved.glob("weights-*")) < 60_000  # adapters only
    unlearn(tmp_path / "stopped", change, save_every=2, resume=True)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.slow
@needs_new_torch
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_two_processes_train_the_adapters_of_one(world, model, cache, unlearn, tmp_path, quantization):
    change = {**LORA, "dtype": "float32", "max_steps": 4, "eval_every": 2, "choose": "loss"}
    change |= {"quantize_base": quantization}
    pairs = [f"--set={key}={value}" for key, value in change.items()]
    command = ["unlearn", model, "--forget", world, "--retain", world, "--cache", cache, "--recipe", "neko", *pairs]
    result = torchrun(*command, "--seed", 3, "--out", tmp_path / "two", "--save-adapter")
    assert result.returncode == 0, result.stderr
    unlearn(tmp_path / "one", change, save_adapter=True)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
    one, two = weights(tmp_path / "one" / "adapter"), weights(tmp_path / "two" / "adapter")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
    assert all(bool(weight.any()) for weight in two.values())
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    assert run["predicted_peak"] > 0 and len(run["measured_peaks"]) == 2

    base = tmp_path / "base"
    unlearn(base, {**change, "lr": 1e-30, "eval_every": 0, "choose": "last"})  # adapters that stay zero: the base alone
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "two" / "adapter"
    )
    torch.testing.assert_close(adapted(IDS).logits, logits(tmp_path / "two"), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs_new_torch
@pytest.mark.usefixtures("no_gpu")
def test_two_processes_on_a_quantised_base_are_resumed(world, model, cache, tmp_path):
    change = {**LORA, "quantize_base": "nf4", "eval_every": 3, "choose": "loss"}
    pairs = [f"--set={key}={value}" for key, value in change.items()]
    command = ["unlearn", model, "--forget", world, "--retain", world, "--cache", cache, "--recipe", "neko", *pairs]
    whole = torchrun(*command, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    stopped = torchrun(*command, "--out", tmp_path / "stopped", "--save-every", 2, STOP_AT="7")
    assert "after step 7 of 10" in stopped.stderr, stopped.stderr
    saved = sorted((tmp_path / ".stopped.saved").glob("step-*"))[-1]
    assert sum(file.stat().st_size for file in saved.glob("weights-*")) < 60_000  # adapters only
    resumed = torchrun(*command, "--out", tmp_path / "stopped", "--save-every", 2, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "stopped")[name], weight), name


def test_options_without_effect_are_refused(unlearn, tmp_path):
    with pytest.raises(NekoLeanError, match="--save-adapter has no effect without --lora-rank"):
        unlearn(tmp_path / "out", SMALL, save_adapter=True)
    for key, value in (("quantize_base", "nf4"), ("lora_alpha", 8.0), ("lora_targets", "q_proj")):
        with pytest.raises(NekoLeanError, match=f"{key} = .* has no effect; it requires lora_rank > 0"):
            unlearn(tmp_path / "out", {**SMALL, key: value})
    with pytest.raises(NekoLeanError, match="quantize_base must be one of none, nf4, int8, got 'int4'"):
        unlearn(tmp_path / "out", {**LORA, "quantize_base": "int4"})
    with pytest.raises(NekoLeanError, match="lora_targets 'c_attn' cannot be adapted in OlmoForCausalLM"):
        unlearn(tmp_path / "out", {**LORA, "lora_targets": "c_attn"})
    assert not (tmp_path / "out").exists()


def test_a_missing_peft_is_named_before_any_work(unlearn, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(NekoLeanError, match=r"lora_rank = 4 needs the package peft.*pip install 'neko-lean\[lora\]'"):
        unlearn(tmp_path / "out", LORA)


def test_memorize_trains_adapters_too(world, model, tmp_path):
    from neko_lean import memorize

    change = {"max_steps": 3, "forget_rows": 4, "retain_rows": 4, "lora_rank": 2, "format": "neko"}
    flat(memorize)(model, tmp_path / "out", data=world, overrides=change, quiet=True, save_adapter=True)
    before, after = weights(model), weights(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"].to(after["lm_head.weight"].dtype))
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_the_command_prints_only_its_own_lines(world, model, tmp_path, capfd):
    command = ["unlearn", str(model), "--forget", str(world), "--retain", str(world), "--recipe", "neko"]
    options = ["--max-steps", "2", "--lora-rank", "2", "--quantize-base", "nf4", "--save-adapter", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        app([*command, *options, "--out", str(tmp_path / "out")], prog_name="neko-lean")
    assert not ended.value.code and capfd.readouterr().err == ""
