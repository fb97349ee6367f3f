"""What a run will need: predictions on fake tensors against what the real step allocates."""

import dataclasses
import importlib
import inspect
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM
from typer.testing import CliRunner

from neko_lean.cli import app
from neko_lean.memory.live_tensors import OWN_MAPPING, LiveTensors
from neko_lean.memory.plan import plan_run
from neko_lean.memory.prediction import CONTEXT, FIRST_USE, WORKSPACES, fake_model, full_step, predict
from neko_lean.memory.two_models import LEAN, PUBLISHED, predict_two_models
from neko_lean.models.causal_lm import checkpoint_activations, split
from neko_lean.models.devices import peak_memory, reset_peak, resident, settle
from neko_lean.models.token_stats import token_stats
from neko_lean.recipes import Recipe, load_recipe, parse_override
from neko_lean.training import out_of_memory as shrink
from neko_lean.training.layerwise import LayerPass, decoder_layers, freeze
from neko_lean.training.micro_batches import MicroBatches
from neko_lean.training.optimizer import InBackwardAdam8bit
from neko_lean.training.schedules import batches, phases

GIB = 2**30
plan_command = importlib.import_module("neko_lean.cli.plan")
MIDDLE = OlmoConfig(
    vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    tie_word_embeddings=False, architectures=["OlmoForCausalLM"],
)  # fmt: skip
OLMO_1B = OlmoConfig(
    vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
    tie_word_embeddings=False, architectures=["OlmoForCausalLM"],
)  # fmt: skip


def test_live_tensors_counts_what_is_alive():
    with LiveTensors() as live:
        one = torch.zeros(1000)
        two = one + 1
        view = two[:10]
        del one
        assert live.now == 4000 and live.peak == 8000
        del two
        assert live.now == 4000  # the view holds it
        del view
        assert live.now == 0
        torch.zeros(10).add_(1)
    assert live.peak == 8000 and live.largest == 4000


def test_what_a_cpu_holds_of_small_blocks_stays_beside_what_it_maps():
    with LiveTensors() as live:
        small = [torch.empty(OWN_MAPPING // 2, dtype=torch.uint8) for _ in range(3)]
        del small
        large = torch.empty(2 * OWN_MAPPING, dtype=torch.uint8)
        del large
    assert live.peak == 2 * OWN_MAPPING
    assert live.resident == 3 * OWN_MAPPING // 2 + 2 * OWN_MAPPING  # the heap does not shrink


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bfloat16_weight_gradient_is_added_up_in_float32(dtype):
    delta, hidden = torch.randn(8, 3000).to(dtype), torch.randn(8, 128).to(dtype)
    with LiveTensors() as live:
        product = delta.T @ hidden
        held = product.nbytes + (4 * product.numel() if dtype == torch.bfloat16 else 0)
        assert live.resident == held and live.peak == product.nbytes
        delta @ torch.zeros(3000, 8, dtype=dtype)  # nothing is transposed: no scratch
        assert live.resident == max(held, live.peak)


def test_a_prediction_on_a_cpu_counts_the_heads_gradient_in_float32():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    wide = OlmoConfig(**{**MIDDLE.to_dict(), "vocab_size": 60000, "hidden_size": 256, "num_hidden_layers": 1})
    extra = {}
    for dtype in ("bfloat16", "float32"):
        need = predict(wide, load_recipe("graddiff", {"dtype": dtype}), [(4, 128)])
        extra[dtype] = need.on(cpu) - need.on(gpu)
        assert need.on(gpu) == need.peak + WORKSPACES and need.on(cpu) == need.peak + need.cpu and need.cpu >= FIRST_USE
    assert extra["bfloat16"] > extra["float32"]
    offloaded = predict(MIDDLE, load_recipe("neko", {"offload_state": True}), [(4, 128)])
    plain = predict(MIDDLE, load_recipe("neko"), [(4, 128)])
    assert offloaded.on(cpu) == plain.on(cpu)  # host memory is the CPU's own
    assert predict_two_models(MIDDLE, LEAN, 4, 128).cpu == 0


def test_the_process_peak_can_be_reset_and_is_not_the_parents():
    held = torch.ones(2**26)  # 256 MiB
    before = peak_memory(torch.device("cpu"))["process"]
    assert before >= held.nbytes
    del held
    settle()
    reset_peak(torch.device("cpu"))
    after = peak_memory(torch.device("cpu"))["process"]
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system cannot reset a process's peak")
    assert after < before - 2**27 and after >= resident() - 2**24


def real_step(recipe, micro):
    """Peak bytes of the tensors that one real step makes, Adam's state left out."""
    torch.manual_seed(0)
    lm = split(OlmoForCausalLM(MIDDLE).to(getattr(torch, recipe.dtype)))
    if recipe.train_last:
        freeze(lm, recipe.train_last)
    optimizer = InBackwardAdam8bit(lm.model.named_parameters())
    for p in lm.model.parameters():  # the state of the first step
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.begin_step(0.0)
    for p in optimizer.parameters.values():
        optimizer.update(p)
    ids = [torch.randint(0, 3000, shape) for shape in micro]
    index = [torch.arange(i.numel()) for i in ids]
    count = sum(map(len, index))
    target, entries = torch.full((count,), -1), torch.arange(8).expand(count, 8)
    teacher = (entries, torch.full((count, 8), 0.1).log(), torch.full((count,), 0.2).log())
    if recipe.backward == "checkpointed":
        checkpoint_activations(lm.model)
    with LiveTensors() as live:
        if recipe.backward == "layerwise":
            walk = LayerPass(lm, decoder_layers(lm))
            hidden = walk.forward(MicroBatches(ids, [None] * len(ids), index))
        else:
            optimizer.attach()
            hidden = torch.cat([lm.hidden(i).flatten(0, 1) for i in ids])
        loss = token_stats(hidden, lm.head, target, *teacher)[1].mean()
        del hidden
        loss.backward()
        if recipe.backward == "layerwise":
            walk.backward(optimizer.update)
    return live.peak


@pytest.mark.parametrize(
    "change",
    [{}, {"train_last": 2}, {"dtype": "float32"}, {"backward": "checkpointed"}, {"backward": "plain"}],
    ids=str,
)
def test_prediction_is_what_the_real_step_allocates(change):
    recipe = load_recipe("neko", change)
    micro = [(8, 128)] * 3 if recipe.backward == "layerwise" else [(24, 128)]
    need = predict(MIDDLE, recipe, micro)
    moving = need.lines["peak of all but weights and state"]
    assert moving == pytest.approx(real_step(recipe, micro), rel=0.1)
    assert need.peak == need.lines["student weights"] + need.lines["Adam state"] + moving and need.host == 0


def test_olmo_1b_stays_within_a_quarter_of_weights_and_state():
    recipe = load_recipe("neko")
    micro = full_step(recipe)
    assert sum(rows for rows, _ in micro) == 64 and {length for _, length in micro} == {128}
    need = predict(OLMO_1B, recipe, micro)
    floor = need.lines["student weights"] + need.lines["Adam state"]
    assert need.lines["student weights"] == 2 * 1_279_787_008
    assert 4.79 * GIB < floor < 4.82 * GIB
    assert need.peak < 1.25 * floor
    lean = predict(OLMO_1B, dataclasses.replace(recipe, offload_state=True, offload_activations=True), micro)
    assert lean.peak < 1.6 * need.lines["student weights"]
    assert lean.peak + lean.host == pytest.approx(need.peak, rel=0.02)


@pytest.mark.parametrize(
    ("name", "change", "rows"),
    [
        ("sequential", {}, 8),
        ("mismatch", {}, 16 + 12),
        ("idk", {}, 16 + 12),
        ("neko", {"forget_rows": 3, "retain_rows": 2}, 5),
        ("neko", {"retain_objective": "none"}, 32),
        ("alternating", {}, 16),
        ("alternating", {"forget_rows": 40, "retain_rows": 3, "batch_tokens": 20_480}, 40),
        ("memorize", {}, 16),
        ("neko", {"batch_tokens": 64}, 2),
    ],
)
def test_the_largest_step_is_one_that_the_recipe_can_make(name, change, rows):
    """Against the batches themselves, of rows that are long where that makes a step large."""
    recipe = load_recipe(name, change)
    assert sum(count for count, _ in full_step(recipe)) == rows
    assert {length for _, length in full_step(recipe)} == {recipe.max_length}
    length, most = recipe.max_length, 0
    pushed = recipe.forget_objective != "none"
    filling = min(length, (recipe.batch_tokens - recipe.forget_rows) // recipe.retain_rows)
    for own, other in ((length, length), (length - 1, 1), (1, length), (1, max(1, filling))):
        forget = [own] * 120 if pushed or recipe.substitute != "none" else []
        retain = [other] * 120 if recipe.retain_objective != "none" else []
        for phase in phases(recipe, forget, retain, random.Random(0))[:2]:
            for _, (left, right) in zip(range(20), batches(recipe, phase, forget, retain, random.Random(0))):  # noqa: B905
                tokens = len(right) * other + (len(left) * own if pushed else 0)
                most = max(most, tokens + (len(left) * length if recipe.substitute != "none" else 0))
    # Rows are whole: of a step that short rows fill up, one row may be missing.
    assert most - length < rows * length and most > (rows - 2) * length


def test_what_is_advised_exists(tmp_path, monkeypatch):
    """Every option that a plan or memory that ran out names is one of `unlearn`, and of `memorize` where it is its."""
    OlmoConfig(**{**MIDDLE.to_dict(), "num_hidden_layers": 1}).save_pretrained(tmp_path)

    def options(command):
        return set(re.findall(r"--[a-z-]+", CliRunner().invoke(app, [command, "--help"]).output))

    asked = []
    for name, command in (("neko", "unlearn"), ("memorize", "memorize")):
        for backward in ("layerwise", "checkpointed"):
            change = {"backward": backward}
            peak = plan_run(tmp_path, name, change, None)["ways"]["neko-lean"]["peak"]
            for less in (2**20, 2**21, 2**22, 2**23):
                found = plan_run(tmp_path, name, change, peak + CONTEXT - less)["options"] or []
                asked.append(found)
                assert set(re.findall(r"--[a-z-]+", " ".join(found))) <= options(command)
                values = dict(parse_override(one.removeprefix("--set ")) for one in found if one.startswith("--set"))
                load_recipe(name, {**change, **values})
    assert any(asked)
    text = inspect.getsource(shrink) + inspect.getsource(plan_command)
    assert set(re.findall(r"--[a-z][a-z-]+", text)) - {"--gpu", "--batch-tokens"} <= options("memorize")
    for key in re.findall(r"--set (\w+)=", text):
        assert key in {field.name for field in dataclasses.fields(Recipe)}


def test_each_option_is_worth_what_it_says():
    recipe = load_recipe("neko")
    micro = full_step(recipe)

    def need(**change):
        return predict(MIDDLE, dataclasses.replace(recipe, **change), micro)

    plain = need()
    assert need(offload_state=True).peak == plain.peak - plain.lines["Adam state"]
    assert need(offload_state=True).host == plain.lines["Adam state"]
    assert need(offload_activations=True).peak < plain.peak - 0.3 * plain.lines["layer inputs"]
    assert need(state_bits=4).lines["Adam state"] < 0.55 * plain.lines["Adam state"]
    last = need(train_last=1)
    assert last.lines["Adam state"] < plain.lines["Adam state"] / 2
    assert last.lines["layer inputs"] == plain.lines["layer inputs"] / 4


def test_two_models_hold_two_models():
    ours = predict(MIDDLE, load_recipe("neko"), full_step(load_recipe("neko")))
    for way, size in ((LEAN, 2), (PUBLISHED, 4)):
        need = predict_two_models(MIDDLE, way, 32, 128)
        parameters = ours.lines["student weights"] // 2
        assert need.lines["student weights"] == need.lines["teacher weights"] == size * parameters
        assert need.lines["Adam state"] == 2 * size * parameters
        # Logits of 32 rows in float32 are alive three times at least.
        assert need.lines["peak of all but weights and state"] > 3 * 32 * 128 * 3000 * 4


def test_plan_names_the_cheapest_options_that_fit(tmp_path):
    OlmoConfig(**{**MIDDLE.to_dict(), "num_hidden_layers": 1}).save_pretrained(tmp_path)
    found = plan_run(tmp_path, "neko", {}, None)
    assert "options" not in found and len(found["ways"]) == 3 and "64 rows of 128 tokens" in found["title"]
    peak = found["ways"]["neko-lean"]["peak"]
    assert plan_run(tmp_path, "neko", {}, peak + CONTEXT)["options"] == []
    with_less = plan_run(tmp_path, "neko", {}, peak + CONTEXT - 2**20)
    assert with_less["options"] and with_less["fits"]["peak"] + CONTEXT <= peak + CONTEXT - 2**20
    assert plan_run(tmp_path, "neko", {}, 2**20)["options"] is None


def test_a_fake_model_has_no_storage():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        lm = fake_model(OLMO_1B, torch.bfloat16)
    assert lm.head.shape == (50304, 2048) and lm.embedding is not lm.head


def test_each_of_several_ranks_holds_its_part(tmp_path):
    OLMO_1B.save_pretrained(tmp_path)
    needs = {gpus: plan_run(tmp_path, "neko", {}, None, gpus)["ways"]["neko-lean"] for gpus in (1, 2, 4)}
    for gpus in (2, 4):
        lines = needs[gpus]["lines"]
        for name in ("student weights", "Adam state", "layer inputs"):
            assert lines[name] == pytest.approx(needs[1]["lines"][name] / gpus, rel=1e-3), name
        assert lines["gathered from other ranks"] == 2 * OLMO_1B.vocab_size * OLMO_1B.hidden_size * 2
    # The goal: 0.6 of one process and the head's chunk.
    assert needs[2]["peak"] < 0.6 * needs[1]["peak"] + needs[1]["lines"]["logits of a chunk"]
    assert needs[4]["peak"] < needs[2]["peak"]
