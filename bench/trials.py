"""A trial of bench/two_processes.py: two processes on one output, and everything that happens to it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Child, Outcome
from small_jobs import Job

WORK = {"cache-teacher": "partial", "score": "partial", "report": "partial", "demo": "demo"}  # default: saved
USER = "chapter one\n"


@dataclass
class Known:
    """The output of an undisturbed run of a job, and what it took."""

    folder: Path
    digest: str
    value: Any
    seconds: float
    operations: int


@dataclass
class Trial:
    """One output and everything that happens to it."""

    folder: Path  # holds the output and what is next to it
    logs: Path
    before: str
    third: Job  # the job whose output, or killed run, is there before
    pair: list[tuple[Job, dict[str, bool]]]
    messages: list[str] = field(default_factory=list)  # everything that the processes printed
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def users(self) -> Path:
        """Path of the user's file, if the trial has one."""
        work = self.folder / f".out.{WORK.get(self.pair[0][0].command, 'saved')}"
        places = {"a user's file": self.out, "a user's folder": self.out / "thesis.txt"}
        return places.get(self.before, work / "thesis.txt")

    def child(self, job: Job, flags: dict[str, bool], **kwargs: Any) -> Child:
        log = self.logs / f"{len(self.messages)}-{len(list(self.logs.iterdir()))}-{random.random()}"
        out = self.out
        return Child(lambda: job(out, **flags), log, str(self.folder), **kwargs)

    def record(self, job: Job, flags: dict[str, bool], outcome: Outcome, known: dict[Job, Known]) -> Outcome:
        """Record how a process ended and what is wrong with that, and return its outcome."""
        self.messages += [outcome.printed, outcome.sentence]
        self.story.append(f"{job.name} {sorted(k for k in flags if flags[k])}: {outcome.ended} {outcome.sentence}")
        if outcome.ended == "crashed":
            self.faults.append(f"traceback: {outcome.sentence} {outcome.printed[-2000:]}")
            self.counts["tracebacks"] += 1
        if outcome.ended == "refused" and ("\n" in outcome.sentence or not outcome.sentence.endswith(".")):
            self.faults.append(f"the error is not one sentence: {outcome.sentence!r}")
            self.counts["other faults"] += 1
        if outcome.ended == "ok" and outcome.value != known[job].value:
            self.faults.append(f"{job.name} returned another run's numbers")
            self.counts["wrong numbers"] += 1
        return outcome
