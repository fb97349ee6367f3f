"""Prefetching."""

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.training.prefetch import prefetched


def test_results_are_prefetched_and_errors_are_raised():
    made, used = [], []

    def make():
        made.append(len(made))
        if len(made) == 4:
            raise NekoLeanError("no fourth one")
        return made[-1]

    with pytest.raises(NekoLeanError, match="no fourth one"):
        for batch in prefetched(make):
            used.append(batch)
    assert used == [0, 1, 2]
