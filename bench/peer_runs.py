"""Runs of bench/peers.py: one worker in a separate process, its events, and its peak memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
INTERVAL = 0.01  # seconds between two samples of the resident set


@dataclass
class Run:
    """What one run of a contender measured."""

    peak: int = 0  # bytes above the imports, until the last step has ended, without the reference pass
    step_seconds: list[float] = field(default_factory=list)  # of each step after the first
    losses: list[float] = field(default_factory=list)
    reference_seconds: float | None = None  # of the pass that precomputes reference log-probabilities
    reference_peak: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # of the teacher's pass, or of all steps
    error: str = ""  # why it did not run, if it did not

    def summary(self) -> str:
        """One line for the log."""
        if self.error:
            return f"failed: {self.error}"
        losses = ", ".join(f"{loss:.4f}" for loss in self.losses)
        seconds = ", ".join(f"{seconds:.2f}" for seconds in self.step_seconds)
        return f"peak {self.peak / 2**20:.0f} MiB; steps of {seconds} s; losses {losses}"


class ResidentPeak:
    """Samples the resident set of another process from a thread."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self.stopped = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def read(self) -> int:
        """Bytes that are resident now, mapped files included; 0 once the process has ended."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):
            return 0

    def take(self) -> int:
        """The peak since the last call."""
        peak, self.peak = max(self.peak, self.read()), 0
        return peak

    def _sample(self) -> None:
        while not self.stopped.wait(INTERVAL):
            self.peak = max(self.peak, self.read())


def run_worker(python: str, script: Path, job: dict[str, Any], work: Path) -> Run:
    """Run a worker to its end.

    Args:
        python: interpreter of its environment. Only this script's own sees the package in this repository.
        script: the worker.
        job: what it reads.
        work: folder for the job and the log.
    """
    (work / "job.json").write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    if python == sys.executable:
        environment["PYTHONPATH"] = str(BENCH.parent)
    log = work / "stderr.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, str(script), str(work / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            run = _follow(process)
        finally:
            process.kill()  # no effect after its end
            process.wait()
    if process.returncode:
        lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
        run.error = lines[-1][:300] if lines else f"exit code {process.returncode}"
    elif not run.peak:
        run.error = "the worker ended without training"
    return run


def _follow(process: subprocess.Popen[str]) -> Run:
    """Read a worker's events until it ends."""
    assert process.stdin is not None and process.stdout is not None
    run, resident, before, peaks = Run(), ResidentPeak(process.pid), 0, [0]
    resident.thread.start()
    for line in process.stdout:
        if not line.startswith('{"event"'):
            continue
        event = json.loads(line)
        kind = event.pop("event")
        if kind == "imported":
            run.versions, before = event["versions"], resident.read()
            resident.take()
            print(file=process.stdin, flush=True)
        elif kind == "loss":
            run.losses.append(event["loss"])
        elif kind == "step" and event["seconds"] is not None:
            run.step_seconds.append(event["seconds"])
        elif kind == "reference begins":
            peaks.append(resident.take())
        elif kind == "reference ended":
            run.reference_seconds = event["seconds"]
            run.reference_peak = event["peak"] or resident.take() - before
        elif kind == "trained":
            run.peak = event["peak"] or max(*peaks, resident.take()) - before
            run.seconds = event["seconds"]
    process.wait()
    resident.stopped.set()
    return run
