"""The entries selected from logits, compared with float64, for flat and confident teachers."""

import itertools

import pytest
import torch

from neko_lean.cache import teacher as teacher_module
from neko_lean.cache.format import SCALE
from neko_lean.cache.invariants import MASS_TOLERANCE, SUM_TOLERANCE
from neko_lean.cache.teacher import _select
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.models.loading import load_model
from tests.helpers import encoded


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("vocab_size", [50, 20000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
def test_entries_are_positive_and_the_tail_is_the_rest(scale, vocab_size, stored):
    torch.manual_seed(0)
    logits = torch.randn(8, vocab_size) * scale
    probability = logits.double().softmax(1)
    for k, mass in itertools.product((1, 8, vocab_size), (0.9, 1.0)):
        counts, ids, scaled_p, tail = _select(logits.clone(), k, mass, stored)
        assert scaled_p.dtype == stored and (counts >= 1).all() and (scaled_p > 0).all() and (tail < 0).all()
        parts = zip(probability, ids.split(counts.tolist()), scaled_p.split(counts.tolist()), tail, strict=True)
        for p, own, scaled, own_tail in parts:
            outside = p.clone()
            outside[own] = 0
            torch.testing.assert_close(own_tail.double().exp(), outside.sum(), rtol=2e-3, atol=1e-6)
            torch.testing.assert_close(scaled.double() / SCALE, p[own], rtol=1e-3, atol=1e-12)
            inside = -own_tail.double().expm1()
            assert (scaled.double().sum() / SCALE - inside).abs() <= MASS_TOLERANCE * inside + SUM_TOLERANCE


@pytest.mark.parametrize("mass", [0.9, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_non_finite_logit_makes_the_tail_nan(broken, mass):
    logits = torch.randn(3, 50)
    logits[1, 7] = broken
    tail = _select(logits, 8, mass, torch.float16)[3]
    assert tail.isnan().tolist() == [False, True, False]


def test_memory_use_is_one_layer_or_one_chunk_of_logits(monkeypatch, model, world):
    """Besides the weights: the activations of one layer, and at most one chunk of logits."""
    teacher = load_model(model, torch.float32, torch.device("cpu"))
    batch = encoded(world)
    positions, vocabulary = sum(map(len, batch)), teacher.head.shape[0]
    monkeypatch.setattr(teacher_module, "CHUNK_ELEMENTS", 64 * vocabulary)
    with LiveTensors() as backbone:
        teacher_module.hidden_states(teacher, batch, 0)
    with LiveTensors() as live:
        teacher_module.top_k_entries(teacher, batch, 0, 64, 0.999)
    assert live.peak <= backbone.peak + 4 * 64 * vocabulary
    assert live.largest <= max(backbone.largest, 4 * 64 * vocabulary) < 4 * positions * vocabulary
