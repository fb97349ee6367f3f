"""Stochastic rounding to bfloat16."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.training.rounding import round_stochastically


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), seed=st.integers(0, 1000))
def test_a_value_is_rounded_to_a_neighbour(value, seed):
    exact = torch.full((64,), value, dtype=torch.float32)
    rounded = round_stochastically(exact, torch.Generator().manual_seed(seed)).float()
    down = (exact.view(torch.int32) & -65536).view(torch.float32)  # toward zero
    up = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)  # away from it
    assert ((rounded == down) | (rounded == up)).all()
    if down[0] == exact[0]:
        assert (rounded == exact).all()


def test_rounding_is_correct_in_expectation():
    generator = torch.Generator().manual_seed(0)
    for value in (0.02001, -0.02001, 1.0003, -123.4):
        rounded = round_stochastically(torch.full((200_000,), value), generator)
        ulp = 2.0 ** (torch.tensor(abs(value)).log2().floor().item() - 7)
        assert abs(rounded.double().mean().item() - torch.tensor(value).item()) < ulp * 0.006  # five standard errors
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    out = round_stochastically(special, generator)
    assert torch.equal(out[[0, 1, 3]].float(), special[[0, 1, 3]]) and out[2].isnan()
