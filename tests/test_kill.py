"""A handful of runs killed with SIGKILL in real processes; bench/kill.py does hundreds of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.checkpoints.test_resume import result, saved
from tests.killed import KILLS

REPOSITORY = Path(__file__).parents[1]


def test_runs_killed_at_any_moment_end_in_the_same_bytes(world, model, cache, tmp_path):
    for name, folder in (("world", world), ("model", model), ("cache", cache)):
        (tmp_path / name).symlink_to(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", tmp_path],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = result(tmp_path / "whole")
    for number, name in enumerate(KILLS):
        if name != "at a random moment":
            assert found[name]["killed"] == signal.SIGKILL, name
        assert found[name]["resumed"] == 0, (name, done.stderr)
        assert result(tmp_path / f"out{number}") == wanted, name
        assert not saved(tmp_path / f"out{number}").exists()
