import math

import numpy as np
import pytest

from neko_lean.scoring.benchmarks.metrics import (
    benchmark_truth_ratio,
    closer_to_one,
    min_k_score,
    normalised_probability,
    privleak,
    true_better,
)
from neko_lean.scoring.values import harmonic_mean


def logs(*probabilities):
    return np.log(probabilities)


def test_wrong_answers_of_different_lengths_and_numbers():
    wrong = [logs(0.2), logs(0.4, 0.4, 0.4)]
    assert normalised_probability(logs(0.5), wrong) == pytest.approx(0.5 / 1.1)
    assert benchmark_truth_ratio(logs(0.5), wrong) == pytest.approx(math.sqrt(0.08) / 0.5)
    assert benchmark_truth_ratio(logs(0.5), wrong[:1]) == pytest.approx(0.4)


def test_aggregates():
    assert closer_to_one([0.5, 2.0, 1.0]) == pytest.approx(2 / 3)
    assert true_better([0.25, 3.0]) == pytest.approx(0.375)
    assert harmonic_mean([1.0, 0.5]) == pytest.approx(2 / 3)
    assert harmonic_mean([1.0, 0.0]) == 0


def test_min_k_rounds_down_and_keeps_at_least_one_token():
    assert min_k_score(logs(0.5, 0.1, 0.2, 0.9)) == pytest.approx(-math.log(0.1))
    assert min_k_score(logs(0.5)) == pytest.approx(math.log(2))


def test_privleak_is_zero_for_the_retain_model_and_negative_for_remembered_text():
    assert privleak(0.6, 0.6) == pytest.approx(0)
    assert privleak(1.0, 0.5) == pytest.approx(-100)
