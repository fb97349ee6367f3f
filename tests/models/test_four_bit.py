"""4-bit weights come back right on every CPU, whatever the shape."""

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st

from neko_lean.models import dequantize_4bit


def reference(codes, state):
    """The definition: each code's value times the scale of its block of the flattened weight."""
    scales = state.absmax
    if state.nested:
        values = state.state2.code[scales.int()] * state.state2.absmax.repeat_interleave(256)[: len(scales)]
        scales = values + state.offset
    nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[: state.shape.numel()].long()
    return (state.code[nibbles] * scales.repeat_interleave(state.blocksize)[: len(nibbles)]).view(state.shape)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    kind=st.sampled_from(["nf4", "fp4"]),
    block=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    nested=st.booleans(),
)
def test_a_weight_of_any_shape_comes_back(shape, kind, block, dtype, nested):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.02).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    found = dequantize_4bit(codes, state)
    assert found.dtype == dtype and found.shape == shape and state.shape == shape
    torch.testing.assert_close(found.float(), reference(codes, state), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_can_be_stored_as_another_dtype(storage):
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    torch.testing.assert_close(dequantize_4bit(codes, state), reference(codes.view(torch.uint8), state))
