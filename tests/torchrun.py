"""Run the command line under torchrun, with cache shards so small that every rank writes several.

If the environment variable STOP_AT is set to a step, rank 1 receives SIGTERM after that step.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neko_lean.models.sharding import FSDPModule

ROOT = Path(__file__).parents[1]


needs_new_torch = pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="training across ranks needs torch 2.13 or newer"
)


def torchrun(
    *arguments: object, ranks: int = 2, script: str = __file__, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `neko-lean ARGUMENTS` (or another `script`) as `ranks` processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), script]
    # Always on the CPU: a machine may have fewer GPUs than a test has ranks.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=300)


def set_rank(monkeypatch: pytest.MonkeyPatch, rank: int, *, world_size: int, local_rank: int | None = None) -> None:
    """Set the environment that torchrun gives to rank `rank` when all ranks run on this machine."""
    environment = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "RANK": rank,
        "LOCAL_RANK": rank if local_rank is None else local_rank,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))


def stop_rank_1_after(last_step: int) -> None:
    """Make rank 1 send itself SIGTERM after training step `last_step`."""
    from neko_lean.training.loop import Loop

    step = Loop._step

    def step_and_stop(self, *arguments):
        values = step(self, *arguments)
        if self.state.step == last_step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    Loop._step = step_and_stop


if __name__ == "__main__":
    from neko_lean.cache import planning
    from neko_lean.cli import main

    planning.SHARD_POSITIONS = 400
    if "STOP_AT" in os.environ:
        stop_rank_1_after(int(os.environ["STOP_AT"]))
    main()
