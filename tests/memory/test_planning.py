"""`plan`: estimates, and the options with which a run fits a GPU."""

import dataclasses
import importlib
import inspect
import re

import pytest
from transformers import AutoModelForCausalLM, OlmoConfig
from typer.testing import CliRunner

from neko_lean.cli import app
from neko_lean.errors import NekoLeanError
from neko_lean.memory import fake_models, planning, prediction
from neko_lean.memory.estimate import CONTEXT
from neko_lean.memory.planning import _gpu_bytes, plan
from neko_lean.models import CHUNK_ELEMENTS, load_config
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
    """Leave out the two-model baselines and the adapters, which take most of a prediction's time."""
    monkeypatch.setattr(planning, "TWO_MODEL_BASELINES", ())
    monkeypatch.setattr(planning, "ADAPTERS", ())


def command_options(command):
    return set(re.findall(r"--[a-z-]+", CliRunner().invoke(app, [command, "--help"]).output))


def test_every_suggested_option_exists(one_layer, without_baselines):
    """Options named by `plan` are options of `unlearn`, or of `memorize` for its recipes, and valid recipe values."""
    suggested = []
    for name, command in (("neko", "unlearn"), ("memorize", "memorize")):
        for backward in ("layerwise", "checkpointed"):
            change = {"backward": backward}
            peak = plan(one_layer, recipe=name, overrides=change)["ways"]["neko-lean"]["peak"]
            for missing in (2**20, 2**21, 2**22, 2**23):
                options = plan(one_layer, recipe=name, overrides=change, gpu=peak + CONTEXT - missing)["options"] or []
                suggested.append(options)
                assert set(re.findall(r"--[a-z-]+", " ".join(options))) <= command_options(command)
                changes = [text.removeprefix("--set ") for text in options if text.startswith("--set")]
                load_recipe(name, {**change, **dict(map(parse_override, changes))})
    assert any(suggested)


def test_every_option_in_out_of_memory_messages_exists():
    text = inspect.getsource(out_of_memory) + inspect.getsource(plan_command)
    named = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--gpu", "--gpus", "--batch-tokens"}
    assert named <= command_options("memorize")
    for key in re.findall(r"--set (\w+)=", text):
        assert key in {field.name for field in dataclasses.fields(Recipe)}


def test_the_plan_names_three_ways_to_run(one_layer):
    planned = plan(one_layer, recipe="neko")
    assert "options" not in planned and len(planned["ways"]) == 3 and "64 rows of 128 tokens" in planned["title"]


def test_the_plan_names_the_cheapest_options_that_fit(one_layer, without_baselines):
    peak = plan(one_layer, recipe="neko")["ways"]["neko-lean"]["peak"]
    assert plan(one_layer, recipe="neko", gpu=peak + CONTEXT)["options"] == []
    smaller = plan(one_layer, recipe="neko", gpu=peak + CONTEXT - 2**20)
    assert smaller["options"] and smaller["fits"]["peak"] + CONTEXT <= peak + CONTEXT - 2**20
    assert plan(one_layer, recipe="neko", gpu=2**20)["options"] is None


def test_each_rank_holds_its_share(tmp_path, without_baselines):
    OLMO_1B.save_pretrained(tmp_path)
    estimates = {gpus: plan(tmp_path, recipe="neko", gpus=gpus)["ways"]["neko-lean"] for gpus in (1, 2, 4)}
    for gpus in (2, 4):
        lines = estimates[gpus]["lines"]
        for name in ("student weights", "Adam state"):
            assert lines[name] == pytest.approx(estimates[1]["lines"][name] / gpus, rel=1e-3), name
        assert lines["layer inputs"] < 1.2 * estimates[1]["lines"]["layer inputs"] / gpus
        assert lines["gathered from other ranks"] == 2 * OLMO_1B.vocab_size * OLMO_1B.hidden_size * 2
    # The goal is 0.6 of a single process, plus the head's chunk.
    assert estimates[2]["peak"] < 0.6 * estimates[1]["peak"] + 8 * CHUNK_ELEMENTS
    assert estimates[4]["peak"] < estimates[2]["peak"]


@pytest.mark.parametrize("name", ["neko", "graddiff", "memorize"])
@pytest.mark.parametrize("backward", ["layerwise", "checkpointed"])
def test_the_lines_add_up_to_the_peak(one_layer, without_baselines, name, backward):
    """To the byte, for all combinations of options that move memory."""
    changes = [{"offload_state": True}, {"state_bits": 4}, {"train_last": 1}, {"micro_tokens": 512}]
    changes += [{"offload_activations": True}] if backward == "layerwise" else []
    for change in changes:
        estimate = plan(one_layer, recipe=name, overrides={"backward": backward, **change})["ways"]["neko-lean"]
        assert estimate["peak"] == sum(estimate["lines"].values()) > 0
        assert estimate["host"] == sum(estimate["host_lines"].values())
        assert (estimate["host"] > 0) == any(key.startswith("offload") for key in change)


def test_a_gpu_that_cannot_hold_the_weights_gets_no_advice(tmp_path, without_baselines):
    OLMO_1B.save_pretrained(tmp_path)
    planned = plan(tmp_path, recipe="neko", gpu=2 * 2**30)
    assert planned["options"] is None and planned["fits"] is None
    assert "bfloat16 weights alone are 2.38 GiB" in planned["reason"] and "no option" in planned["reason"]


@pytest.mark.parametrize("name, command", [("neko", "unlearn"), ("memorize", "memorize")])
def test_adapters_are_compared_and_used_where_weights_do_not_fit(one_layer, monkeypatch, name, command):
    monkeypatch.setattr(planning, "TWO_MODEL_BASELINES", ())
    monkeypatch.setattr(planning, "ADAPTERS", ({"lora_rank": 4}, {"lora_rank": 4, "quantize_base": "nf4"}))
    change = {"micro_tokens": 128, "max_length": 128}
    full, lora, quantized = plan(one_layer, recipe=name, overrides=change, gpu=2**40)["comparison"]
    assert full["options"] == [] and full["name"] == "full fine-tune"
    peaks = [setup["estimate"]["peak"] for setup in (full, lora, quantized)]
    assert peaks == sorted(peaks, reverse=True)
    for setup in (lora, quantized):
        changes = dict(parse_override(text.removeprefix("--set ")) for text in setup["options"] if "=" in text)
        changes |= {"lora_rank": 4, "quantize_base": "nf4" if "nf4" in setup["name"] else "none"}
        planned = plan(one_layer, recipe=name, overrides={**change, **changes})["ways"]["neko-lean"]
        assert planned["peak"] == setup["estimate"]["peak"]
        assert set(re.findall(r"--[a-z-]+", setup["name"])) <= command_options(command)
    # The answer is the first that fits, with the fewest changes to what is trained.
    for missing in (0, 2**21, 2**23):
        fits = plan(one_layer, recipe=name, overrides=change, gpu=CONTEXT + quantized["estimate"]["peak"] - missing)
        first = next((setup for setup in fits["comparison"] if setup["options"] is not None), {"options": None})
        assert fits["options"] == first["options"] and (fits["reason"] is None) == (first["options"] is not None)
    # A recipe with adapters is not compared with others, and neither is any without PEFT.
    assert plan(one_layer, recipe=name, overrides={**change, "lora_rank": 4}, gpu=2**40)["comparison"] is None
    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: None)
    assert plan(one_layer, recipe=name, overrides=change, gpu=2**40)["comparison"] is None


def test_a_quantised_base_is_planned_for_several_gpus(one_layer, monkeypatch):
    monkeypatch.setattr(planning, "TWO_MODEL_BASELINES", ())
    monkeypatch.setattr(planning, "ADAPTERS", ({"lora_rank": 4}, {"lora_rank": 4, "quantize_base": "nf4"}))
    change = {"micro_tokens": 128, "max_length": 128}
    setups = {gpus: plan(one_layer, recipe="neko", overrides=change, gpu=2**40, gpus=gpus) for gpus in (1, 2)}
    assert [len(planned["comparison"]) for planned in setups.values()] == [3, 3]
    one, two = (planned["comparison"][2] for planned in setups.values())
    assert two["options"] == ["--lora-rank 4", "--quantize-base nf4"]
    overrides = {**change, "lora_rank": 4, "quantize_base": "nf4"}
    assert two["estimate"] == plan(one_layer, recipe="neko", overrides=overrides, gpus=2)["ways"]["neko-lean"]
    weights = [setup["estimate"]["lines"]["student weights"] for setup in (one, two)]
    assert weights[0] / 2 < weights[1] < weights[0]


def test_the_smallest_peak_is_one_that_options_reach(one_layer, without_baselines):
    options = {"micro_tokens": 512, "offload_state": True, "offload_activations": True, "train_last": 1}
    smallest = plan(one_layer, recipe="neko", overrides=options)["ways"]["neko-lean"]["peak"]
    planned = plan(one_layer, recipe="neko", gpu=CONTEXT + smallest - 1)
    assert planned["options"] is None and f"peaks at {smallest / 2**30:.2f} GiB" in planned["reason"]


def test_layers_that_cannot_run_alone_are_planned_as_they_train(one_layer, without_baselines, monkeypatch):
    def refuse(lm):
        raise NekoLeanError("the layers of this family pass on more than their hidden states.")

    monkeypatch.setattr(fake_models, "decoder_layers", refuse)
    monkeypatch.setattr(prediction, "decoder_layers", refuse)
    for gpus in (1, 2):
        planned = plan(one_layer, recipe="neko", gpus=gpus)
        assert planned["backward"] == "checkpointed" and planned["gpus"] == 1
        assert ("2 GPUs" in planned["fallback"]) == (gpus == 2) and "layer by layer" in planned["fallback"]


def test_the_plan_tells_the_time_of_a_step_and_the_size_of_the_cache(one_layer, without_baselines):
    planned = plan(one_layer, recipe="neko")
    per_position = 12 + 64 * (2 + 2)
    assert planned["cache"]["bytes"] == 1000 * 128 * per_position
    step = planned["step"]
    assert step["tokens"] == 64 * 128
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(load_config(one_layer)).parameters())
    assert step["flops"] == 8 * (parameters - 3000 * 128) * step["tokens"]  # the untied embedding is a lookup
    assert step["seconds"]["H100"] == pytest.approx(step["flops"] / (0.4 * 989e12))
    assert plan(one_layer, recipe="memorize")["cache"] is None


@pytest.mark.parametrize(("text", "size"), [("8GB", 8), ("7.5 GiB", 7.5), ("RTX 4090", 24), ("a100 80gb", 80)])
def test_a_gpu_is_a_size_or_a_card(text, size):
    assert _gpu_bytes(text) == size * 2**30
