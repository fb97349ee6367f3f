import pytest

from neko_lean.scoring.benchmarks.ks_test import ks_p_value

# Expected values: scipy.stats.ks_2samp(first, second).pvalue of scipy 1.17.1.
CASES = [
    (range(10), [0.7 * x + 2.5 for x in range(10)], 0.7869297884777761),
    ([x / 7 for x in range(40)], [x / 5 + 1 for x in range(40)], 0.0012708143485281624),
    ([1, 2, 2, 3, 5], [2, 3, 3, 4, 4, 6, 7], 0.43434343434343425),
    (range(400), range(90, 490), 2.7675164465641644e-09),
    (range(40), range(100, 160), 1.4549439350345037e-28),
    ([1, 2], [1, 2], 1.0),
]


@pytest.mark.parametrize(("first", "second", "expected"), CASES)
def test_p_value_is_that_of_scipy(first, second, expected):
    assert ks_p_value(list(first), list(second)) == pytest.approx(expected, rel=1e-9)


def test_empty_sample_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        ks_p_value([], [1.0])
