"""What tests start under torchrun: the command line, with shards so small that every rank writes several."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(*arguments: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`neko-lean ARGUMENTS` by so many processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, __file__, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


if __name__ == "__main__":
    from neko_lean.cache import writer
    from neko_lean.cli import main

    writer.SHARD_POSITIONS = 400
    main()
