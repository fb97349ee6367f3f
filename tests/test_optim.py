"""The in-backward optimizer: parity with bitsandbytes, stochastic rounding, gradients freed at once."""

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neko_lean import optim
from neko_lean.optim import InBackwardAdam8bit, round_stochastically


@pytest.mark.parametrize("part", [4096, 2**22])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float32_weights_match_bitsandbytes_bit_for_bit(monkeypatch, part, weight_decay):
    monkeypatch.setattr(optim, "SLICE", part)
    torch.manual_seed(0)
    shapes = [(100, 130), (64, 64), (40,), (5000,)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = InBackwardAdam8bit(ours, weight_decay=weight_decay)
    reference = bnb.optim.Adam8bit(theirs, weight_decay=weight_decay)
    for step in range(5):
        lr = 1e-2 / (step + 1)
        gradients = [torch.randn(s) for s in shapes]
        mine.begin_step(lr)
        sum((p * g).sum() for p, g in zip(ours, gradients, strict=True)).backward()
        for group in reference.param_groups:
            group["lr"] = lr
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g
        reference.step()
        for one, two in zip(ours, theirs, strict=True):
            assert torch.equal(one, two)
            assert one.grad is None


def test_bfloat16_weights_move_as_far_as_float32_ones():
    """lr 5e-5 on weights near 0.02: rounding to nearest would leave most of them where they were."""
    torch.manual_seed(0)
    start = torch.full((8192,), 0.02).bfloat16()
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = InBackwardAdam8bit([p])
        for _ in range(100):
            optimizer.begin_step(5e-5)
            p.sum().backward()
        moved[dtype] = (start.double() - p.detach().double()).mean().item()
    assert moved[torch.float32] == pytest.approx(100 * 5e-5, rel=0.02)
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.02)


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_rounding_gives_a_neighbour(value, seed):
    exact = torch.full((64,), value, dtype=torch.float32)
    rounded = round_stochastically(exact, torch.Generator().manual_seed(seed)).float()
    down = (exact.view(torch.int32) & -65536).view(torch.float32)  # toward zero
    up = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)  # away from it
    assert ((rounded == down) | (rounded == up)).all()
    if down[0] == exact[0]:
        assert (rounded == exact).all()


def test_rounding_is_right_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    for value in (0.02001, -0.02001, 1.0003, -123.4):
        rounded = round_stochastically(torch.full((200_000,), value), generator)
        ulp = 2.0 ** (torch.tensor(abs(value)).log2().floor().item() - 7)
        assert abs(rounded.double().mean().item() - torch.tensor(value).item()) < ulp * 0.006  # five standard errors
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    out = round_stochastically(special, generator)
    assert torch.equal(out[[0, 1, 3]].float(), special[[0, 1, 3]]) and out[2].isnan()


def test_the_same_seed_gives_the_same_weights_and_close_takes_the_hooks_off():
    def train(seed):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5000).bfloat16())
        optimizer = InBackwardAdam8bit([p], seed=seed)
        for _ in range(3):
            optimizer.begin_step(1e-3)
            (p.float() ** 2).sum().backward()
        optimizer.close()
        before = p.detach().clone()
        (p.float() ** 2).sum().backward()
        assert torch.equal(p, before) and p.grad is not None
        return before

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


def test_state_is_two_bytes_and_a_scale_a_weight():
    large, small = torch.nn.Parameter(torch.randn(256 * 100)), torch.nn.Parameter(torch.randn(100))
    optimizer = InBackwardAdam8bit([large, small])
    optimizer.begin_step(1e-3)
    (large.sum() + small.sum()).backward()
    assert optimizer.state_bytes() == 2 * 25600 + 2 * 4 * 100 + 2 * 4 * 100
