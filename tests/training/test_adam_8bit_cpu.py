"""The 8-bit update on a CPU: codes, scales and weights are those of bitsandbytes bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.training import adam_8bit_cpu
from neko_lean.training.adam_8bit_cpu import Codebook, blockwise_update_on_cpu, dequantize, quantize_
from neko_lean.training.adam_state import BLOCK, AdamSettings, new_state

SIGNED, UNSIGNED = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)
CPU = torch.device("cpu")


def gradients(numel, step):
    """Gradients [numel] of many magnitudes, some of them 0, in single elements and in whole blocks."""
    generator = torch.Generator().manual_seed(step)
    magnitude = torch.exp(3 * torch.randn(numel, generator=generator) - 6)
    grad = torch.randn(numel, generator=generator) * magnitude
    grad[torch.rand(numel, generator=generator) < 0.1] = 0.0
    grad[: 2 * BLOCK] = 0.0
    grad[3 * BLOCK : 4 * BLOCK] *= 1e-20  # the second moment underflows
    return grad


@pytest.mark.parametrize("numel", [4096, 5000, 3 * 4096 + 1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weights_codes_and_scales_are_those_of_bitsandbytes(monkeypatch, numel, weight_decay):
    monkeypatch.setattr(adam_8bit_cpu, "CPU_SLICE", 4096)
    update = blockwise_update_on_cpu(AdamSettings((0.9, 0.999), 1e-8, weight_decay), SIGNED, UNSIGNED)
    state, reference = new_state(numel, numel, 8, CPU), new_state(numel, numel, 8, CPU)
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    expected = weight.clone()

    for step in range(1, 6):
        grad = gradients(numel, step)
        update(state, grad, weight, step, 1e-2)
        bnb.optimizer_update_8bit_blockwise(
            "adam", grad, expected, reference.first, reference.second, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2,
            SIGNED, UNSIGNED, reference.scale1, reference.scale2, weight_decay=weight_decay,
        )  # fmt: skip
        assert torch.equal(weight, expected)
        for name, tensor in reference.tensors().items():
            assert torch.equal(state.tensors()[name], tensor), (step, name)


@given(seed=st.integers(0, 10_000), numel=st.integers(1, 3 * BLOCK), scale=st.floats(-30.0, 30.0))
def test_values_survive_quantization_up_to_the_width_of_the_codes(seed, numel, scale):
    book = Codebook.of(SIGNED)
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 10.0**scale
    codes = torch.empty(numel, dtype=torch.uint8)
    scales = torch.empty(-(-numel // BLOCK))
    quantize_(values.clone(), codes, scales, book)
    error = (dequantize(codes, scales, book) - values).abs()
    largest = scales.repeat_interleave(BLOCK)[:numel]
    assert (error <= 0.008 * largest).all()  # neighbouring codes are at most 0.9 / 64 apart
