"""A base in 4 or 8 bits: exact gradients for the dequantised weights, transformers' numbers, and its way back."""

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn
from transformers.pytorch_utils import Conv1D

from neko_lean.errors import NekoLeanError
from neko_lean.models import dequantize_4bit
from neko_lean.models.quantized_base import QuantizedLinear, dequantize_base, quantize_base, quantized_parameters
from tests.helpers import tiny
from tests.models.test_adapters import gpt2

CPU = torch.device("cpu")
IDS = torch.arange(3, 15)[None]
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def conv1d(dtype):
    torch.manual_seed(0)
    layer = Conv1D(64, 96).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


def linear(dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(96, 64, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
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
    tolerance = 0.01 if quantization == "int8" else 0.15
    assert (weight - original.weight).abs().mean() < tolerance * original.weight.abs().mean()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_conv1d_is_the_linear_layer_of_its_transposed_weight_and_comes_back(quantization, dtype):
    original = conv1d(dtype)
    transposed = nn.Linear(96, 64, dtype=dtype)
    transposed.weight.data, transposed.bias.data = original.weight.detach().T.contiguous(), original.bias.detach()
    layer, expected = (QuantizedLinear(other, quantization, CPU) for other in (original, transposed))
    assert (layer.in_features, layer.out_features) == (96, 64)
    assert torch.equal(layer.weight, expected.weight) and torch.equal(layer.scales, expected.scales)
    x = torch.randn(2, 5, 96, dtype=dtype)
    assert torch.equal(layer(x), expected(x))

    back = layer.plain(CPU)
    assert type(back) is Conv1D and (back.nx, back.nf) == (96, 64) and back.weight.is_contiguous()
    assert torch.equal(back.weight, layer.dequantized().T) and torch.equal(back.bias, original.bias)
    close = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(back(x), layer(x), rtol=close, atol=close)
    assert (back.weight - original.weight).abs().mean() < 0.15 * original.weight.abs().mean()
    assert type(expected.plain(CPU)) is nn.Linear


def test_a_weight_becomes_what_bitsandbytes_own_layers_make_of_it():
    weight = linear(bias=False).weight.detach()
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    four = QuantizedLinear(linear(bias=False), "nf4", CPU)
    assert torch.equal(four.weight, codes) and torch.equal(four.dequantized(), dequantize_4bit(codes, state))
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


def test_gpt2_comes_back_with_its_own_layers():
    lm, plain = gpt2(torch.float32), gpt2(torch.float32)
    quantize_base(lm, "nf4", CPU)
    layers = [module for module in lm.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 4 * 2 and not any(isinstance(module, Conv1D) for module in lm.model.modules())
    assert quantized_parameters(lm.model) == {p for layer in layers for p in (layer.weight, layer.scales)}
    expected = lm.model(IDS).logits.detach()
    dequantize_base(lm, CPU)
    assert quantized_parameters(lm.model) == set()
    torch.testing.assert_close(lm.model(IDS).logits, expected)
    assert [type(module) for module in lm.model.modules()] == [type(module) for module in plain.model.modules()]
    plain.model.load_state_dict(lm.model.state_dict())
    assert torch.equal(plain.model(IDS).logits, lm.model(IDS).logits)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(NekoLeanError, match=r"no nn\.Linear or Conv1D in the layers of FalconForCausalLM; leave"):
        quantize_base(tiny("Falcon"), "nf4", CPU)


@pytest.mark.cuda
@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_gpu_stores_and_dequantises_what_a_cpu_does(gpu, quantization, make):
    on_cpu, on_gpu = (QuantizedLinear(make(torch.bfloat16), quantization, device) for device in (CPU, gpu))
    expected, actual = on_cpu.dequantized().float(), on_gpu.dequantized().float().cpu()
    # A value halfway between two codes may be rounded to either.
    step = expected.abs().max() * (1 / 127 if quantization == "int8" else 0.2)
    assert (actual - expected).abs().max() <= 1.1 * step and ((actual - expected).abs() > 1e-3).float().mean() < 0.01
