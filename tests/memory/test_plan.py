"""`plan`: estimates, and the options with which a run fits a GPU."""

import dataclasses
import importlib
import inspect
import re

import pytest
from transformers import OlmoConfig
from typer.testing import CliRunner

from neko_lean.cli import app
from neko_lean.memory import plan
from neko_lean.memory.estimate import CONTEXT
from neko_lean.memory.plan import plan_run
from neko_lean.recipe import Recipe, load_recipe, parse_override
from neko_lean.training import out_of_memory
from tests.memory.configs import MIDDLE, OLMO_1B

plan_command = importlib.import_module("neko_lean.cli.plan")


@pytest.fixture
def one_layer(tmp_path):
    """Folder with the config of a model with one layer."""
    OlmoConfig(**{**MIDDLE.to_dict(), "num_hidden_layers": 1}).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def without_baselines(monkeypatch):
    """Leave out the two-model baselines, which take most of a prediction's time."""
    monkeypatch.setattr(plan, "TWO_MODEL_BASELINES", ())


def command_options(command):
    return set(re.findall(r"--[a-z-]+", CliRunner().invoke(app, [command, "--help"]).output))


def test_every_suggested_option_exists(one_layer, without_baselines):
    """Options named by `plan` are options of `unlearn`, or of `memorize` for its recipes, and valid recipe values."""
    suggested = []
    for name, command in (("neko", "unlearn"), ("memorize", "memorize")):
        for backward in ("layerwise", "checkpointed"):
            change = {"backward": backward}
            peak = plan_run(one_layer, name, change, None)["ways"]["neko-lean"]["peak"]
            for missing in (2**20, 2**21, 2**22, 2**23):
                options = plan_run(one_layer, name, change, peak + CONTEXT - missing)["options"] or []
                suggested.append(options)
                assert set(re.findall(r"--[a-z-]+", " ".join(options))) <= command_options(command)
                changes = [text.removeprefix("--set ") for text in options if text.startswith("--set")]
                load_recipe(name, {**change, **dict(map(parse_override, changes))})
    assert any(suggested)


def test_every_option_in_out_of_memory_messages_exists():
    text = inspect.getsource(out_of_memory) + inspect.getsource(plan_command)
    named = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--gpu", "--batch-tokens"}
    assert named <= command_options("memorize")
    for key in re.findall(r"--set (\w+)=", text):
        assert key in {field.name for field in dataclasses.fields(Recipe)}


def test_the_plan_names_three_ways_to_run(one_layer):
    planned = plan_run(one_layer, "neko", {}, None)
    assert "options" not in planned and len(planned["ways"]) == 3 and "64 rows of 128 tokens" in planned["title"]


def test_the_plan_names_the_cheapest_options_that_fit(one_layer, without_baselines):
    peak = plan_run(one_layer, "neko", {}, None)["ways"]["neko-lean"]["peak"]
    assert plan_run(one_layer, "neko", {}, peak + CONTEXT)["options"] == []
    smaller = plan_run(one_layer, "neko", {}, peak + CONTEXT - 2**20)
    assert smaller["options"] and smaller["fits"]["peak"] + CONTEXT <= peak + CONTEXT - 2**20
    assert plan_run(one_layer, "neko", {}, 2**20)["options"] is None


def test_each_rank_holds_its_share(tmp_path, without_baselines):
    OLMO_1B.save_pretrained(tmp_path)
    estimates = {gpus: plan_run(tmp_path, "neko", {}, None, gpus)["ways"]["neko-lean"] for gpus in (1, 2, 4)}
    for gpus in (2, 4):
        lines = estimates[gpus]["lines"]
        for name in ("student weights", "Adam state", "layer inputs"):
            assert lines[name] == pytest.approx(estimates[1]["lines"][name] / gpus, rel=1e-3), name
        assert lines["gathered from other ranks"] == 2 * OLMO_1B.vocab_size * OLMO_1B.hidden_size * 2
    # The goal is 0.6 of a single process, plus the head's chunk.
    assert estimates[2]["peak"] < 0.6 * estimates[1]["peak"] + estimates[1]["lines"]["logits of a chunk"]
    assert estimates[4]["peak"] < estimates[2]["peak"]
