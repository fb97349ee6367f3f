"""Sampled tokens follow the softmax of the logits, whatever the block size, and depend only on each row's key."""

import numpy as np
import pytest
import torch

from neko_lean.errors import NekoLeanError
from neko_lean.scoring import sampling
from neko_lean.scoring.sampling import random_stream, sample_key, sampled_tokens


@pytest.mark.parametrize("block", [1, 4, 256])
def test_tokens_are_drawn_from_the_softmax(monkeypatch, block):
    monkeypatch.setattr(sampling, "BLOCK", block)
    logits = torch.tensor([2.0, 0.0, -1.0, 1.5, -torch.inf, 0.5, 0.5, -torch.inf, -torch.inf, -torch.inf, 1.0])
    count = 20_000
    stream = random_stream(sample_key(0, "row", 0))
    drawn = np.bincount(
        [sampled_tokens(logits[None], [stream], "a token")[0] for _ in range(count // 10)]
        + sampled_tokens(logits.expand(count, -1), [stream] * count, "a token"),
        minlength=len(logits),
    )
    p = logits.softmax(0).numpy()
    expected = p * drawn.sum()
    assert (drawn[p == 0] == 0).all() and drawn.sum() == count * 11 // 10
    chi_square = ((drawn - expected)[p > 0] ** 2 / expected[p > 0]).sum()
    assert chi_square < 22.5  # the 99.9th percentile with 6 degrees of freedom


def test_draws_depend_on_the_key_and_the_step_alone():
    logits = torch.randn(40, 700, generator=torch.Generator().manual_seed(0))
    keys = [sample_key(7, f"row {n // 4}", n % 4) for n in range(40)]

    def draw(order):
        streams = [random_stream(keys[row]) for row in order]
        steps = [sampled_tokens(logits[order], streams, "a token") for _ in range(3)]
        return {row: [step[place] for step in steps] for place, row in enumerate(order)}

    together = draw(list(range(40)))
    assert draw(list(range(40))[::-1]) == together
    assert all(draw([row])[row] == together[row] for row in range(40))
    # Other samples, rows and seeds draw something else.
    other = [random_stream(sample_key(8, "row 0", 0)), random_stream(sample_key(7, "row 0", 0))]
    assert len({str(stream.random()) for stream in [*map(random_stream, keys), other[0]]}) == 41
    assert other[1].random() == random_stream(keys[0]).random()


def test_rounding_of_the_logits_does_not_change_draws_from_a_flat_distribution():
    """A draw from the cumulative distribution would change for every thousandth token or so."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 5000, generator=generator) / 10
    rounded = logits + 1e-6 * torch.randn(logits.shape, generator=generator)
    draws = [
        sampled_tokens(some, [random_stream(f"{row}") for row in range(len(some))], "a token")
        for some in (logits, rounded)
    ]
    assert sum(one != two for one, two in zip(*draws, strict=True)) <= 1
    assert len(set(draws[0])) > 1500


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_logits_are_refused(value):
    logits = torch.zeros(2, 300)
    logits[1, 7] = value
    with pytest.raises(NekoLeanError, match="output for a token is NaN or infinite"):
        sampled_tokens(logits, [random_stream("a"), random_stream("b")], "a token")


@pytest.mark.cuda
def test_draws_on_a_gpu_are_those_of_the_cpu(gpu):
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(0))
    draws = [
        sampled_tokens(some, [random_stream(f"{row}") for row in range(len(some))], "a token")
        for some in (logits, logits.to(gpu))
    ]
    assert draws[0] == draws[1]
