"""A student sharded over two processes: its gradients, its weights after training, and its checkpoints."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from neko_lean.cache.writer import cache_teacher
from neko_lean.errors import NekoLeanError
from neko_lean.models.sharding import FSDPModule
from neko_lean.runs import memorize, training_run, unlearn
from neko_lean.training import optimizer as optim
from tests import nccl, sharded
from tests.helpers import flat
from tests.torchrun import needs_new_torch, torchrun

pytestmark = pytest.mark.usefixtures("no_gpu")

CHANGE = {"max_steps": 20, "forget_rows": 4, "retain_rows": 4, "eval_rows": 4, "lr": 1e-3, "eval_every": 5}


def weights(folder):
    return load_file(folder / "model.safetensors")


@needs_new_torch
@pytest.mark.slow
def test_gradients_are_those_of_plain_autograd(world, model, tmp_path):
    """For two-term losses, several micro-batches per rank, uneven shards, and tied and untied heads."""
    (tmp_path / "world").symlink_to(world)
    flat(cache_teacher)(
        model, tmp_path / "cache", retain=world, forget=world, format="neko", dtype="float32", quiet=True
    )
    result = torchrun(tmp_path, script=sharded.__file__)
    assert result.returncode == 0, result.stderr
    errors = json.loads(result.stdout)
    assert len(errors) == 2 * len(sharded.RECIPES)
    assert max(errors.values()) < 1e-7, errors  # token weights are float32


@needs_new_torch
@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(world, model, cache, tmp_path, monkeypatch):
    """They differ as little as two single-process runs with different random bits for rounding. A run that is stopped
    and resumed ends in the same weights."""
    pairs = [f"--set={key}={value}" for key, value in CHANGE.items()]
    command = ["unlearn", model, "--forget", world, "--retain", world, "--cache", cache, "--recipe", "neko", *pairs]
    result = torchrun(*command, "--out", tmp_path / "two", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 20
    run_json = json.loads((tmp_path / "two" / "run.json").read_text())
    assert len(run_json["measured_peaks"]) == 2 and run_json["recipe"]["backward"] == "layerwise"

    def run(name, **kwargs):
        options = {"cache": cache, "recipe": "neko", "overrides": CHANGE, "quiet": True}
        return flat(unlearn)(model, tmp_path / name, forget=world, retain=world, **{**options, **kwargs})

    run("single")
    original = optim.round_stochastically
    other_bits = torch.Generator().manual_seed(99)
    monkeypatch.setattr(optim, "round_stochastically", lambda value, _: original(value, other_bits))
    run("again")
    single, again, two = (weights(tmp_path / name) for name in ("single", "again", "two"))
    start = weights(model)
    assert two.keys() == single.keys()
    for name, weight in single.items():
        change, noise, difference = (
            (other.float() - weight.float()).abs().mean() for other in (start[name], again[name], two[name])
        )
        assert difference < 1.3 * noise < change, name
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and "eval_quality" in lines[4]

    stopped = torchrun(*command, "--out", tmp_path / "stopped", "--save-every", 3, STOP_AT="8")
    assert f"stopped by {signal.Signals.SIGTERM.name} after step 8 of 20" in stopped.stderr, stopped.stderr
    assert stopped.stderr.count("stopped by") == 1 and "torchrun --nproc-per-node 2 -m neko_lean" in stopped.stderr
    assert len(list((tmp_path / ".stopped.saved").glob("step-*"))) == 2
    with pytest.raises(NekoLeanError, match=r"holds a run with another .*ranks"):
        run("stopped", resume=True)
    resumed = torchrun(*command, "--out", tmp_path / "stopped", "--save-every", 3, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name, weight in weights(tmp_path / "stopped").items():
        assert torch.equal(weight, two[name]), name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_older_torch_is_refused_before_anything_is_written(world, model, tmp_path, monkeypatch):
    monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    data = {"forget": world, "retain": world, "quiet": True}
    flat(unlearn)(model, tmp_path / "plan", dry_run=True, **data)  # a single process needs no newer torch

    monkeypatch.setattr(training_run, "world_size", lambda: 2)
    message = r"^training across ranks needs torch 2\.13 or newer, but torch 2\.11\.0\+cu130 is installed; .*\.$"
    with pytest.raises(NekoLeanError, match=message):
        flat(unlearn)(model, tmp_path / "out", **data)
    with pytest.raises(NekoLeanError, match=message):
        flat(memorize)(model, tmp_path / "out", data=world, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["checkpointed", "plain"])
def test_other_backward_modes_are_refused(world, model, cache, tmp_path, monkeypatch, value):
    from neko_lean.training import backward

    monkeypatch.setattr(backward, "world_size", lambda: 2)
    with pytest.raises(NekoLeanError, match=f"backward={value} works only in a single process"):
        flat(unlearn)(
            model,
            tmp_path / "out",
            forget=world,
            retain=world,
            cache=cache,
            recipe="neko",
            overrides={"backward": value},
            quiet=True,
        )


@pytest.mark.cuda
def test_one_rank_on_a_gpu_has_the_gradients_of_plain_autograd_over_nccl():
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    ended = torchrun(script=nccl.__file__, ranks=1, CUDA_VISIBLE_DEVICES=visible.split(",")[0])
    assert ended.returncode == 0, ended.stderr
    outcome = json.loads(ended.stdout)
    assert outcome["backend"] == "nccl" and outcome["difference"] < 1e-5, outcome
