"""What the workers of bench/peers.py share: their job, and the events by which they are measured.

A worker runs with the Python of its contender, so this module imports nothing but the standard library and torch.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "trl")


def read_job() -> dict[str, Any]:
    """The job that peers.py wrote: the file that the command line names."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return job


def read_sets(job: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the sets "forget", "retain" and "refusal", each with its input_ids and prompt_length."""
    sets: dict[str, list[dict[str, Any]]] = json.loads(Path(job["sets"]).read_text())
    return sets


def report(event: str, **values: Any) -> None:
    """Print an event for peers.py. Everything else that a worker prints is ignored."""
    print("\n" + json.dumps({"event": event, **values}), flush=True)


def wait_after_imports() -> None:
    """Call this after all imports: what the process holds now is not counted."""
    report("imported", versions={name: version(name) for name in PACKAGES if find_spec(name)})
    sys.stdin.readline()


class StepClock:
    """Reports how long each step took. The first step is a warm-up and is not timed.

    Args:
        device: where training runs.
        steps: number of steps; "trained" is reported after the last one.
    """

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.steps, self.count = torch.device(device), steps, 0
        self.start = self.last_end = now(self.device)

    def end_step(self) -> None:
        """Call this at the end of each step, after the weights were updated."""
        end = now(self.device)
        self.count += 1
        report("step", seconds=end - self.last_end if self.count > 1 else None)
        self.last_end = end
        if self.count == self.steps:
            report("trained", peak=allocator_peak(self.device), seconds=end - self.start)


def now(device: torch.device) -> float:
    """Seconds: on a CPU those that this process computed for, so that other work on the machine does not count; on a
    GPU those that have passed, after all its work has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def allocator_peak(device: torch.device) -> int | None:
    """Largest number of bytes that PyTorch has allocated on a GPU; None on a CPU, where peers.py samples instead."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
