"""A student spread over two processes: its gradients, its weights after some steps, and its saves."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from neko_lean.cache.settings import CacheSettings
from neko_lean.cache.writer import cache_teacher
from neko_lean.errors import NekoLeanError
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.runs import unlearn
from neko_lean.training import optimizer as optim
from tests import sharded
from tests.helpers import flat
from tests.torchrun import torchrun

pytestmark = pytest.mark.usefixtures("no_gpu")

CHANGE = {"max_steps": 20, "forget_rows": 4, "retain_rows": 4, "eval_rows": 4, "lr": 1e-3, "eval_every": 5}


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_gradients_are_those_of_plain_autograd(world, model, tmp_path):
    """Two-term losses, two micro-batches and more a rank, weights that do not split evenly, head tied and untied."""
    (tmp_path / "world").symlink_to(world)
    cache_teacher(
        model,
        world,
        tmp_path / "cache",
        forget=world,
        settings=CacheSettings(format="neko", dtype="float32"),
        options=OutputOptions(quiet=True),
    )
    found = torchrun(tmp_path, script=sharded.__file__)
    assert found.returncode == 0, found.stderr
    worst = json.loads(found.stdout)
    assert len(worst) == 2 * len(sharded.RECIPES)
    assert max(worst.values()) < 1e-7, worst  # token weights are float32


def test_two_processes_end_in_the_weights_of_one(world, model, cache, tmp_path, monkeypatch):
    """As near as one process to itself with other random bits in the rounding; and a run that was stopped ends in the
    weights of one that was not."""
    pairs = [f"--set={key}={value}" for key, value in CHANGE.items()]
    given = ["unlearn", model, "--forget", world, "--retain", world, "--cache", cache, "--recipe", "neko", *pairs]
    found = torchrun(*given, "--out", tmp_path / "two", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["steps"] == 20
    about = json.loads((tmp_path / "two" / "run.json").read_text())
    assert len(about["measured_peaks"]) == 2 and about["recipe"]["backward"] == "layerwise"

    def run(name, **more):
        options = {"cache": cache, "recipe": "neko", "overrides": CHANGE, "quiet": True}
        return flat(unlearn)(model, tmp_path / name, world, world, **{**options, **more})

    run("one")
    rounding = optim.round_stochastically
    others = torch.Generator().manual_seed(99)
    monkeypatch.setattr(optim, "round_stochastically", lambda value, _: rounding(value, others))
    run("again")
    one, again, two = (weights(tmp_path / name) for name in ("one", "again", "two"))
    start = weights(model)
    assert two.keys() == one.keys()
    for name, weight in one.items():
        moved, noise, apart = (
            (other.float() - weight.float()).abs().mean() for other in (start[name], again[name], two[name])
        )
        assert apart < 1.3 * noise < moved, name
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and "eval_quality" in lines[4]

    stopped = torchrun(*given, "--out", tmp_path / "stopped", "--save-every", 3, STOP_AT="8")
    assert f"stopped by {signal.Signals.SIGTERM.name} after step 8 of 20" in stopped.stderr, stopped.stderr
    assert stopped.stderr.count("stopped by") == 1 and "torchrun --nproc-per-node 2 -m neko_lean" in stopped.stderr
    assert len(list((tmp_path / ".stopped.saved").glob("step-*"))) == 2
    with pytest.raises(NekoLeanError, match=r"holds a run with another .*ranks"):
        run("stopped", resume=True)
    resumed = torchrun(*given, "--out", tmp_path / "stopped", "--save-every", 3, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name, weight in weights(tmp_path / "stopped").items():
        assert torch.equal(weight, two[name]), name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("value", ["checkpointed", "plain"])
def test_other_ways_back_are_refused(world, model, cache, tmp_path, monkeypatch, value):
    from neko_lean.training import backward

    monkeypatch.setattr(backward, "size", lambda: 2)
    with pytest.raises(NekoLeanError, match=f"backward={value} is for one process"):
        unlearn(
            model,
            tmp_path / "out",
            world,
            world,
            cache=cache,
            recipe="neko",
            overrides={"backward": value},
            options=RunOptions(quiet=True),
        )
