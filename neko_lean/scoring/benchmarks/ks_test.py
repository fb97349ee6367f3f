"""The two-sample Kolmogorov-Smirnov test, whose p-value is TOFU's forget quality."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ks_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided p-value of the two-sample Kolmogorov-Smirnov test.

    The samples of sizes m and n define a lattice path from (0, 0) to (m, n): sorted together, a value of the first
    sample is a step to the right and one of the second a step upwards. If both samples come from the same distribution,
    all paths are equally likely, so the p-value is the share of paths that reach a point (i, j) where |i/m - j/n| is at
    least the observed statistic (Hodges 1958, "The significance probability of the Smirnov two-sample test").

    The share is summed over positive terms only, so a p-value such as 1e-50 is as precise as a large one. It takes
    O(mn) time and O(m) memory.

    Args:
        first: [m] values without NaN.
        second: [n] values without NaN.

    Raises:
        ValueError: a sample is empty.

    Example:
        >>> round(ks_p_value([1, 2, 3], [4, 5, 6]), 12)  # 2 of the 20 paths
        0.1
    """
    m, n = len(first), len(second)
    if not m or not n:
        raise ValueError("both samples of the Kolmogorov-Smirnov test need at least one value.")
    statistic = _scaled_statistic(first, second)

    # share[i]: share of the paths to (i, step - i) that reached the statistic; one anti-diagonal per step.
    columns = np.arange(m + 1)
    share = np.zeros(m + 1)
    for step in range(m + n + 1):
        rows = step - columns
        if step:
            from_left = np.concatenate([[0.0], share[:-1]]) * columns
            share = (from_left + share * rows) / step
        reached = np.abs(columns * n - rows * m) >= statistic
        share = np.where(reached, 1.0, share)
        share[(rows < 0) | (rows > n)] = 0.0
    return float(share[m])


def _scaled_statistic(first: Sequence[float], second: Sequence[float]) -> int:
    """m n times the largest difference between the two empirical distribution functions, which is an integer."""
    samples = np.sort(np.asarray(first, dtype=np.float64)), np.sort(np.asarray(second, dtype=np.float64))
    values = np.concatenate(samples)
    below_first, below_second = (np.searchsorted(sample, values, side="right") for sample in samples)
    return int(np.abs(below_first * len(second) - below_second * len(first)).max())
