"""The summary of `unlearn`."""

import pytest

from neko_lean.cli.unlearn import _peak_line

MIB = 2**20


@pytest.mark.parametrize("measured, predicted", [(215, 113), (540, 450), (450, 540)])
def test_a_small_peak_on_a_cpu_says_why_it_is_above_the_prediction(measured, predicted):
    line = _peak_line(measured * MIB, predicted * MIB, on_cpu=True)
    assert "below 0.50 GiB on a CPU" in line and "0.1 GiB above" in line and "resident set" in line
    assert "below" not in _peak_line(measured * MIB, predicted * MIB, on_cpu=False)


def test_a_large_or_unpredicted_peak_says_nothing_about_small_ones():
    assert _peak_line(1321 * MIB, 1229 * MIB, on_cpu=True) == (
        "peak memory: 1.29 GiB measured, 1.20 GiB predicted (growth of the resident set, including the allocator's "
        "overhead)"
    )
    assert _peak_line(100 * MIB, None, on_cpu=True).startswith("peak memory: 0.10 GiB measured, none predicted (")
