"""A process for test_kill.py: has the imports once, forks one run after another, and kills each with SIGKILL.

python -m tests.killed FOLDER    where FOLDER holds world, model and cache
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from bench.processes import forked
from neko_lean.checkpoints import open_run, run_folder, saves, tensors
from neko_lean.runs import unlearn
from tests.helpers import flat

CHANGE = {
    "max_steps": 12,
    "forget_rows": 4,
    "retain_rows": 4,
    "eval_rows": 4,
    "lr": 2e-3,
    "eval_every": 2,
    "choose": "quality",
}


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_second_save():
    """After the weights of the save were written and before its state."""
    original, count = tensors.save_file, [0]

    def dying(*arguments):
        count[0] += 1
        if count[0] == 4:
            die()
        original(*arguments)

    tensors.save_file = dying


def before_the_rename():
    original, count = saves.write_folder, [0]

    def dying(target, fill):
        count[0] += 1
        original(target, lambda folder: (fill(folder), die() if count[0] == 3 else None))

    saves.write_folder = dying


def before_the_output_moves():
    run_folder.publish = die


def behind_the_output():
    open_run.discard = lambda folder: die()


KILLS = {
    "at a random moment": None,
    "in a save": in_the_second_save,
    "before its rename": before_the_rename,
    "before the output moves": before_the_output_moves,
    "behind the output": behind_the_output,
}


def main(root):
    def run(out, resume, spoil=None):
        if spoil is not None:
            spoil()
        more = {"cache": root / "cache", "recipe": "neko", "overrides": CHANGE, "seed": 3, "quiet": True}
        flat(unlearn)(root / "model", root / out, root / "world", root / "world", save_every=3, resume=resume, **more)

    start = time.monotonic()
    assert forked(lambda: run("whole", False)) == 0
    length = time.monotonic() - start
    found = {}
    for number, (name, spoil) in enumerate(KILLS.items()):
        seconds = random.uniform(0.3, 0.9) * length if spoil is None else None
        killed = forked(lambda n=number, s=spoil: run(f"out{n}", False, s), seconds)
        found[name] = {"killed": killed, "resumed": forked(lambda n=number: run(f"out{n}", True))}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
