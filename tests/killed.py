"""Child process of test_kill.py: forks one run after another and kills each with SIGKILL at a different moment.

    python -m tests.killed FOLDER

FOLDER contains world, model and cache. Prints JSON with the exit status of each killed run and of its resumed run.
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
from neko_lean.options import RunOptions
from neko_lean.runs import unlearn

OVERRIDES = {
    "max_steps": 12,
    "forget_rows": 4,
    "retain_rows": 4,
    "eval_rows": 4,
    "lr": 2e-3,
    "eval_every": 2,
    "choose": "quality",
}


def kill_this_process(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_during_the_second_save():
    """Die after the second save's weights are written, but before its state is."""
    save_file = tensors.save_file
    num_calls = 0

    def save_file_or_die(*arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            kill_this_process()
        save_file(*arguments)

    tensors.save_file = save_file_or_die


def kill_before_the_rename():
    """Die when the third save is complete, but not yet renamed."""
    write_folder = saves.write_folder
    num_calls = 0

    def write_folder_and_die(target, fill):
        nonlocal num_calls
        num_calls += 1
        write_folder(target, lambda folder: (fill(folder), kill_this_process() if num_calls == 3 else None))

    saves.write_folder = write_folder_and_die


def kill_before_the_output_is_moved():
    run_folder.publish = kill_this_process


def kill_after_the_output_is_moved():
    open_run.discard = kill_this_process


# For each moment, the function that prepares the process to be killed then. None: a random time.
KILLS = {
    "at a random moment": None,
    "during a save": kill_during_the_second_save,
    "before a save is renamed": kill_before_the_rename,
    "before the output is moved": kill_before_the_output_is_moved,
    "after the output is moved": kill_after_the_output_is_moved,
}


def main(root):
    def run(out, resume, prepare=None):
        if prepare is not None:
            prepare()
        unlearn(
            root / "model",
            root / out,
            forget=root / "world",
            retain=root / "world",
            cache=root / "cache",
            recipe="neko",
            overrides=OVERRIDES,
            run=RunOptions(seed=3, quiet=True, save_every=3, resume=resume),
        )

    start = time.monotonic()
    assert forked(lambda: run("whole", False)) == 0
    seconds_of_run = time.monotonic() - start

    results = {}
    for number, (moment, prepare) in enumerate(KILLS.items()):
        kill_after = random.uniform(0.3, 0.9) * seconds_of_run if prepare is None else None
        killed = forked(lambda n=number, p=prepare: run(f"out{n}", False, p), kill_after)
        results[moment] = {"killed": killed, "resumed": forked(lambda n=number: run(f"out{n}", True))}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
