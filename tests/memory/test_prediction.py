"""Predictions on fake tensors, compared with what a real step allocates."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from neko_lean.memory.estimate import FIRST_USE, PREDICTABLE_CPU_PEAK, WORKSPACES, tensor_bytes
from neko_lean.memory.largest_step import largest_step
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.memory.prediction import predict
from neko_lean.models.causal_lm import as_causal_lm, checkpoint_activations
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.memory_use import peak_memory, reset_peak_memory, resident_memory, trim_memory
from neko_lean.models.quantized_base import quantized_parameters
from neko_lean.recipe import load_recipe
from neko_lean.training.layers import decoder_layers, freeze, prepare_student
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.micro_batches import MicroBatches
from neko_lean.training.optimizer import InBackwardAdam8bit
from tests.helpers import SMALL
from tests.memory.configs import MIDDLE, OLMO_1B

GIB = 2**30


def test_a_prediction_for_a_cpu_includes_the_heads_gradient_in_float32():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    wide = OlmoConfig(**{**MIDDLE.to_dict(), "vocab_size": 60000, "hidden_size": 256, "num_hidden_layers": 1})
    extra = {}
    for dtype in ("bfloat16", "float32"):
        estimate = predict(wide, load_recipe("graddiff", {"dtype": dtype}), [(4, 128)])
        extra[dtype] = estimate.peak_on(cpu) - estimate.peak_on(gpu)
        assert estimate.peak_on(gpu) == estimate.peak + WORKSPACES
        assert estimate.peak_on(cpu) == estimate.cpu_peak >= estimate.peak + FIRST_USE
    assert extra["bfloat16"] > extra["float32"]
    offloaded = predict(MIDDLE, load_recipe("neko", {"offload_state": True}), [(4, 128)])
    plain = predict(MIDDLE, load_recipe("neko"), [(4, 128)])
    assert offloaded.peak_on(cpu) == plain.peak_on(cpu)  # host memory is the CPU's own


def test_the_process_peak_can_be_reset_and_is_not_the_parents():
    block = torch.ones(2**26)  # 256 MiB
    before = peak_memory(torch.device("cpu"))
    assert before >= block.nbytes
    del block
    trim_memory()
    reset_peak_memory(torch.device("cpu"))
    after = peak_memory(torch.device("cpu"))
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system cannot reset a process's peak")
    assert after < before - 2**27 and after >= resident_memory() - 2**24


def test_a_tiny_model_on_a_cpu_peaks_within_the_stated_distance_of_the_prediction(unlearn, tmp_path, no_gpu):
    run = unlearn(tmp_path / "out", {**SMALL, "max_steps": 3})
    assert run["device"] == "cpu" and FIRST_USE < run["predicted_peak"] < PREDICTABLE_CPU_PEAK
    assert abs(run["measured_peak"] - run["predicted_peak"]) < 100 * 2**20


def real_step(recipe, micro):
    """Peak bytes of the tensors that one real step creates, without Adam's state."""
    torch.manual_seed(0)
    lm = as_causal_lm(OlmoForCausalLM(MIDDLE).to(getattr(torch, recipe.dtype)))
    if recipe.train_last:
        freeze(lm, recipe.train_last)
    optimizer = InBackwardAdam8bit(lm.model.named_parameters())
    for parameter in lm.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.begin_step(0.0)
    for parameter in optimizer.parameters.values():
        optimizer.update(parameter)

    ids = [torch.randint(0, 3000, shape) for shape in micro]
    index = [torch.arange(i.numel()) for i in ids]
    count = sum(map(len, index))
    target, entries = torch.full((count,), -1), torch.arange(8).expand(count, 8)
    teacher = (entries, torch.full((count, 8), 0.1).log(), torch.full((count,), 0.2).log())
    if recipe.backward == "checkpointed":
        checkpoint_activations(lm.model)

    with LiveTensors() as live:
        if recipe.backward == "layerwise":
            layer_pass = LayerPass(lm, decoder_layers(lm))
            hidden = layer_pass.forward(MicroBatches(ids, [None] * len(ids), index))
        else:
            optimizer.attach()
            hidden = torch.cat([lm.hidden(i).flatten(0, 1) for i in ids])
        loss = token_stats(hidden, lm.head, target, *teacher)[1].mean()
        del hidden
        loss.backward()
        if recipe.backward == "layerwise":
            layer_pass.backward(optimizer.update)
    return live.peak


@pytest.mark.parametrize(
    "change",
    [{}, {"train_last": 2}, {"dtype": "float32"}, {"backward": "checkpointed"}, {"backward": "plain"}],
    ids=str,
)
def test_the_prediction_equals_what_the_real_step_allocates(change):
    recipe = load_recipe("neko", change)
    micro = [(8, 128)] * 3 if recipe.backward == "layerwise" else [(24, 128)]
    estimate = predict(MIDDLE, recipe, micro)
    transient = estimate.peak - estimate.lines["student weights"] - estimate.lines["Adam state"]
    assert transient == pytest.approx(real_step(recipe, micro), rel=0.1)
    assert estimate.peak == sum(estimate.lines.values()) and estimate.host == 0


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_each_rank_holds_the_whole_quantised_base_and_its_share_of_the_rest(quantization):
    recipe = load_recipe("neko", {"lora_rank": 4, "quantize_base": quantization, "dtype": "float32"})
    lm = as_causal_lm(OlmoForCausalLM(MIDDLE))
    prepare_student(lm, recipe, torch.device("cpu"))
    quantized = quantized_parameters(lm.model)
    base = tensor_bytes(quantized)
    others = [parameter for parameter in lm.model.parameters() if parameter not in quantized]
    one, four = (predict(MIDDLE, recipe, [(4, 128)], ranks=ranks).lines for ranks in (1, 4))
    assert one["student weights"] == base + tensor_bytes(others)
    assert four["student weights"] == base + tensor_bytes(others) // 4
    assert four["Adam state"] == pytest.approx(one["Adam state"] / 4, rel=0.05)
    # The embedding and the head during the loss; a layer's quantised weights are not gathered.
    assert four["gathered from other ranks"] == 2 * 3000 * 128 * 4
    assert four["activations"] == one["activations"]


def test_olmo_1b_peaks_within_a_quarter_above_weights_and_state():
    recipe = load_recipe("neko")
    micro = largest_step(recipe)
    assert sum(rows for rows, _ in micro) == 64 and {length for _, length in micro} == {128}
    estimate = predict(OLMO_1B, recipe, micro)
    floor = estimate.lines["student weights"] + estimate.lines["Adam state"]
    assert estimate.lines["student weights"] == 2 * 1_279_787_008
    assert 4.79 * GIB < floor < 4.82 * GIB
    assert estimate.peak < 1.25 * floor
    lean = predict(OLMO_1B, dataclasses.replace(recipe, offload_state=True, offload_activations=True), micro)
    assert lean.peak < 1.6 * estimate.lines["student weights"]
    assert lean.host > estimate.lines["Adam state"]  # pinned memory is rounded up


def test_each_option_saves_what_it_should():
    recipe = load_recipe("neko")
    micro = largest_step(recipe)

    def estimate(**change):
        return predict(MIDDLE, dataclasses.replace(recipe, **change), micro)

    plain = estimate()
    assert estimate(offload_state=True).peak == plain.peak - plain.lines["Adam state"]
    assert plain.lines["Adam state"] <= estimate(offload_state=True).host <= 2 * plain.lines["Adam state"]
    assert estimate(offload_activations=True).peak < plain.peak - 0.3 * plain.lines["layer inputs"]
    assert estimate(state_bits=4).lines["Adam state"] < 0.55 * plain.lines["Adam state"]
    last = estimate(train_last=1)
    assert last.lines["Adam state"] < plain.lines["Adam state"] / 2
    assert last.lines["layer inputs"] == plain.lines["layer inputs"] / 4
