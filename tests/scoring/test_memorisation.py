"""Memorisation measures against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.scoring.memorisation import (
    answer_numbers,
    answer_probability,
    exact_memorisation,
    extraction_strength,
    truth_ratio,
)
from neko_lean.scoring.views import View


def view(logp, rank=None):
    logp = np.array(logp, dtype=np.float64)
    rank = np.ones(len(logp), dtype=np.int64) if rank is None else np.array(rank)
    return View(logp, np.full(len(logp), 2.0), np.ones(len(logp)), rank)


def by_definition(rank):
    """1 - (number of tokens that must be given for greedy decoding to produce the rest) / n; 0 if all must be."""
    for given_tokens in range(len(rank) + 1):
        if all(one == 1 for one in rank[given_tokens:]):
            return 1 - given_tokens / len(rank)
    raise AssertionError


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12))
def test_extraction_strength_equals_its_definition(rank):
    assert extraction_strength(np.array(rank)) == pytest.approx(by_definition(rank), abs=1e-12)


@pytest.mark.parametrize("length", range(1, 12))
def test_wrong_answer_has_no_extraction_strength(length):
    assert extraction_strength(np.full(length, 2)) == 0.0
    assert extraction_strength(np.ones(length, dtype=int)) == 1.0


def test_examples():
    assert exact_memorisation(np.array([1, 5, 1, 1])) == 0.75
    assert answer_probability(np.log([0.5, 0.125])) == pytest.approx(0.25)
    # Wrong answers at 0.1 and 0.3 against a paraphrase at 0.4.
    wrong = [view(np.log([0.1, 0.1])), view(np.log([0.3]))]
    assert truth_ratio(view(np.log([0.8, 0.2])), wrong) == pytest.approx(0.5)
    found = answer_numbers(view(np.log([0.5, 0.125]), rank=[1, 9]))
    assert found["answer_rank"] == 9 and found["within_ten"] == 1 and found["entropy"] == 2
    assert found["extraction_strength"] == 0 and found["exact_memorisation"] == 0.5
    assert answer_numbers(view([-1.0], rank=[11]))["within_ten"] == 0
