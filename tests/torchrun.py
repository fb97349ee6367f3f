"""What tests start under torchrun: the command line, with shards so small that every rank writes several.

STOP_AT in the environment is a step behind which the last rank gets a SIGTERM.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(
    *arguments: object, ranks: int = 2, script: str = __file__, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`neko-lean ARGUMENTS` by so many processes on this machine, as `script` starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), script]
    # On the CPU everywhere: a machine with a GPU may have fewer of them than a test has ranks.
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=given, timeout=300)


def stop_at(last: int) -> None:
    from neko_lean.training.loop import Loop

    step = Loop._step

    def stopping(self, *arguments):
        values = step(self, *arguments)
        if self.state.step == last and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    Loop._step = stopping


if __name__ == "__main__":
    from neko_lean.cache import writer
    from neko_lean.cli import main

    writer.SHARD_POSITIONS = 400
    if "STOP_AT" in os.environ:
        stop_at(int(os.environ["STOP_AT"]))
    main()
