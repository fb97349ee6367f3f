"""What is kept of logits, against float64: flat, sure and hopelessly sure teachers, in both stored dtypes."""

import itertools

import pytest
import torch

from neko_lean.cache.format import SCALE
from neko_lean.cache.reader import MASS_TOLERANCE, SUM_TOLERANCE
from neko_lean.cache.teacher import _top


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("vocab_size", [50, 20000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
def test_entries_are_above_zero_and_the_tail_is_all_that_is_outside(scale, vocab_size, stored):
    torch.manual_seed(0)
    logits = torch.randn(8, vocab_size) * scale
    probability = logits.double().softmax(1)
    for k, mass in itertools.product((1, 8, vocab_size), (0.9, 1.0)):
        counts, ids, scaled_p, tail = _top(logits.clone(), k, mass, stored)
        assert scaled_p.dtype == stored and (counts >= 1).all() and (scaled_p > 0).all() and (tail < 0).all()
        parts = zip(probability, ids.split(counts.tolist()), scaled_p.split(counts.tolist()), tail, strict=True)
        for p, own, kept, own_tail in parts:
            outside = p.clone()
            outside[own] = 0
            torch.testing.assert_close(own_tail.double().exp(), outside.sum(), rtol=2e-3, atol=1e-6)
            torch.testing.assert_close(kept.double() / SCALE, p[own], rtol=1e-3, atol=1e-12)
            inside = -own_tail.double().expm1()
            assert (kept.double().sum() / SCALE - inside).abs() <= MASS_TOLERANCE * inside + SUM_TOLERANCE


@pytest.mark.parametrize("mass", [0.9, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_logit_makes_the_tail_nan_whatever_is_kept(broken, mass):
    logits = torch.randn(3, 50)
    logits[1, 7] = broken
    tail = _top(logits, 8, mass, torch.float16)[3]
    assert tail.isnan().tolist() == [False, True, False]
