"""Runs that are killed with SIGKILL and resumed end in the same bytes. bench/kill.py repeats this hundreds of times."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.interrupted import result, saved
from tests.killed import KILLS

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
def test_runs_killed_at_any_moment_resume_to_the_same_bytes(world, model, cache, tmp_path):
    for name, folder in (("world", world), ("model", model), ("cache", cache)):
        (tmp_path / name).symlink_to(folder)
    process = subprocess.run(
        [sys.executable, "-m", "tests.killed", tmp_path],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr

    statuses = json.loads(process.stdout.splitlines()[-1])
    uninterrupted = result(tmp_path / "whole")
    for number, moment in enumerate(KILLS):
        if moment != "at a random moment":
            assert statuses[moment]["killed"] == signal.SIGKILL, moment
        assert statuses[moment]["resumed"] == 0, (moment, process.stderr)
        assert result(tmp_path / f"out{number}") == uninterrupted, moment
        assert not saved(tmp_path / f"out{number}").exists()
