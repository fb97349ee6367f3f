"""A base in 4 or 8 bits: exact gradients for the dequantised weights, transformers' numbers, and its way back."""

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn

from neko_lean.errors import NekoLeanError
from neko_lean.models.quantized_base import QuantizedLinear, dequantize_base, quantize_base
from neko_lean.training.layers import prepare_student
from tests.helpers import tiny
from tests.models.test_adapters import gpt2

CPU = torch.device("cpu")
IDS = torch.arange(3, 15)[None]
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def linear(dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(96, 64, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_the_dequantised_weight(quantization, dtype, bias):
    original = linear(dtype, bias)
    layer = QuantizedLinear(original, quantization, CPU)
    weight = layer.dequantized()
    assert weight.dtype == dtype and weight.shape == (64, 96)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    out = layer(x)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream)
    plain = nn.functional.linear(x, weight)
    plain = plain + original.bias if bias else plain
    (expected,) = torch.autograd.grad(plain, x, upstream)
    assert torch.equal(out, plain) and torch.equal(grad, expected)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_weight_becomes_what_bitsandbytes_own_layers_make_of_it():
    weight = linear(bias=False).weight.detach()
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    four = QuantizedLinear(linear(bias=False), "nf4", CPU)
    assert torch.equal(four.weight, codes) and torch.equal(four.dequantized(), bnb.dequantize_4bit(codes, state))
    eight = QuantizedLinear(linear(bias=False), "int8", CPU)
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(eight.weight, codes) and torch.equal(eight.scales, scales)
    assert (eight.dequantized() - weight).abs().max() <= weight.abs().max() / 127 * 0.6  # and float16 rounds
    assert (four.dequantized() - weight).abs().mean() < 0.15 * weight.abs().mean()


@pytest.mark.parametrize("quantization, bits", [("nf4", 4.5), ("int8", 8.5)])
def test_a_quantised_model_is_small_and_comes_back_as_plain_weights(quantization, bits):
    lm, plain = (tiny("Llama", dtype=torch.bfloat16, **WIDE) for _ in range(2))
    quantize_base(lm, quantization, CPU)
    layers = [module for module in lm.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 7 * 2 and type(lm.model.lm_head) is nn.Linear
    stored = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    numel = sum(layer.in_features * layer.out_features for layer in layers)
    assert 8 * stored / numel <= bits
    expected = lm.model(IDS).logits.detach()
    dequantize_base(lm, CPU)
    assert torch.equal(lm.model(IDS).logits, expected)
    assert {n: p.shape for n, p in lm.model.named_parameters()} == {
        n: p.shape for n, p in plain.model.named_parameters()
    }
    assert (expected - plain.model(IDS).logits).abs().max() > 0


def test_models_without_linear_layers_and_several_ranks_are_refused(monkeypatch):
    from neko_lean.recipe import load_recipe
    from neko_lean.training import layers

    with pytest.raises(NekoLeanError, match=r"no nn\.Linear in the layers of GPT2LMHeadModel; leave it out"):
        quantize_base(gpt2(torch.float32), "nf4", CPU)
    recipe = load_recipe("neko", {"lora_rank": 4, "quantize_base": "nf4"})
    monkeypatch.setattr(layers, "world_size", lambda: 2)
    with pytest.raises(NekoLeanError, match="quantize_base works only in a single process"):
        prepare_student(tiny("Llama"), recipe, CPU)


@pytest.mark.cuda
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_gpu_stores_and_dequantises_what_a_cpu_does(gpu, quantization):
    on_cpu, on_gpu = (QuantizedLinear(linear(torch.bfloat16), quantization, device) for device in (CPU, gpu))
    expected, actual = on_cpu.dequantized().float(), on_gpu.dequantized().float().cpu()
    # A value halfway between two codes may be rounded to either.
    step = expected.abs().max() * (1 / 127 if quantization == "int8" else 0.2)
    assert (actual - expected).abs().max() <= 1.1 * step and ((actual - expected).abs() > 1e-3).float().mean() < 0.01
