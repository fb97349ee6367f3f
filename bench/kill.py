"""Kill every command with SIGKILL at random moments, resume it, and compare its bytes with an uninterrupted run.

    .venv/bin/python bench/kill.py --kills 200 --out kill.json

A trial is killed one to three times, each time at a random time or before a random file operation, and then finishes.
It must produce the same bytes except for times, and leave nothing next to its output. The runs are small but cover
everything that a resume restores: three backward passes, phases with their own optimizer, early stopping and a chosen
checkpoint, levels that follow the anchor, dropout, a teacher cache made along the way, and membership. With two ranks,
one or both are killed. The other has some seconds to notice before it is killed too, as torchrun does. A demo or a
report starts again instead of being resumed. Needs Linux or macOS (fork).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Child, Moment, Outcome, run_all, run_ranks
from rich.console import Console
from rich.table import Table
from small_jobs import Job, fingerprint, jobs, make_small, make_world, training_jobs

RESTARTED = ("report", "demo")  # commands without --resume


@dataclass
class Case:
    """A job run by one or two processes, and its output when it is not killed."""

    name: str
    job: Job
    ranks: tuple[int, ...] = (1,)  # numbers of processes to draw from for each start
    digest: str | None = None
    value: Any = None
    seconds: float = 0.0
    operations: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)


def all_cases(root: Path) -> list[Case]:
    """Every case to test."""
    by_command = jobs(root)
    cases = [
        Case("cache-teacher", by_command["cache-teacher"][0]),
        Case("cache-teacher, one or two ranks", by_command["cache-teacher"][0], ranks=(2, 2, 1)),
        Case("score with membership", by_command["score"][2]),
        Case("score, one or two ranks", by_command["score"][0], ranks=(2, 2, 1)),
        Case("unlearn, neko, its own cache", by_command["unlearn"][3]),
        Case("unlearn, neko, two ranks", by_command["unlearn"][0], ranks=(2,)),
        Case("memorize, layerwise, chosen by quality", by_command["memorize"][2]),
    ]
    cases += [Case(f"unlearn, {name}", job) for name, job in training_jobs(root).items()]
    return [*cases, Case("report", by_command["report"][0]), Case("demo", by_command["demo"][0])]


def attempt(case: Case, folder: Path, logs: Path, ranks: int, *, flags: dict[str, bool], **kills: Moment) -> Outcome:
    """Run a case once and kill rank N at the moment `killN`. Returns the outcome of the first rank, or of one that
    crashed."""
    out, number = folder / "out", len(list(logs.iterdir()))
    children = [
        Child(lambda: case.job(out, **flags), logs / f"{number}-{rank}", str(folder), kill=kills.get(f"kill{rank}"))
        for rank in range(ranks)
    ]
    outcomes = run_all(children) if ranks == 1 else run_ranks(children)
    return next((outcome for outcome in outcomes if outcome.ended == "crashed"), outcomes[0])


def measure(case: Case, root: Path) -> None:
    """Run a case twice without a kill, record its output, and check that both runs agree."""
    results = []
    for number in range(2):
        folder, logs = root / f"whole-{number}", root / f"whole-{number}-logs"
        folder.mkdir()
        logs.mkdir()
        start = time.monotonic()
        outcome = attempt(case, folder, logs, case.ranks[0], flags={})
        case.seconds = time.monotonic() - start
        assert outcome.ended == "ok", f"{case.name}: {outcome.sentence} {outcome.printed}"
        case.digest, case.value = fingerprint(folder / "out"), outcome.value
        case.operations = outcome.operations
        results.append((case.digest, case.value))
        assert [path.name for path in folder.iterdir()] == ["out"], case.name
        shutil.rmtree(folder)
        shutil.rmtree(logs)
    assert results[0] == results[1], f"{case.name}: two runs without a kill gave different results"


def trial(case: Case, root: Path, rng: random.Random) -> list[str]:
    """Kill a case one to three times, let it finish, and return what is wrong with the result."""
    folder, logs = root / "trial", root / "trial-logs"
    folder.mkdir()
    logs.mkdir()
    faults = []
    restarted = case.job.command in RESTARTED

    # Kill it.
    for number in range(rng.randint(1, 3)):
        ranks = rng.choice(case.ranks)
        moment = Moment.drawn(rng, case.seconds, case.operations)
        victims = [0] if ranks == 1 else rng.choice(([0], [1], [0, 1]))
        flags = {"overwrite": number > 0} if restarted else {"resume": number > 0}
        kills = {f"kill{rank}": moment for rank in victims}
        outcome = attempt(case, folder, logs, ranks, flags=flags, **kills)
        if outcome.ended == "crashed":
            faults.append(f"crashed: {outcome.sentence} {outcome.printed[-2000:]}")
        killed = outcome.ended == "killed" or (ranks > 1 and outcome.ended != "ok")
        case.counts["kills" if killed else "ended before its kill"] += 1
        if killed:
            case.moments[stage_of(folder)] += 1

    # Let it finish, and compare.
    flags = {"overwrite": True} if restarted else {"resume": True}
    outcome = attempt(case, folder, logs, rng.choice(case.ranks), flags=flags)
    if outcome.ended != "ok":
        faults.append(f"the last run {outcome.ended}: {outcome.sentence} {outcome.printed[-2000:]}")
    elif outcome.value != case.value:
        faults.append("the last run returned different numbers")
    if fingerprint(folder / "out") != case.digest:
        faults.append("the output differs from that of an uninterrupted run")
    left = [path.name for path in folder.iterdir() if path.name != "out"]
    if left:
        faults.append(f"leftover files: {left}")

    case.counts["trials"] += 1
    case.counts["same bytes"] += not faults
    case.counts["faulty"] += bool(faults)
    shutil.rmtree(folder)
    shutil.rmtree(logs)
    return faults


def stage_of(folder: Path) -> str:
    """At which stage a run was killed, judged by the files that it left."""
    works = [path for path in folder.iterdir() if path.is_dir() and path.name.startswith(".out.")]
    if (folder / "out").exists():
        return "after its output was in place"
    if not works:
        return "before it wrote anything"
    inside = [path for work in works for path in work.rglob("*")]
    if any(path.name.endswith(".tmp") or ".tmp/" in str(path) for path in inside):
        return "in the middle of a write"
    if any(path.name in ("complete", "output", "manifest.json", "scores.json", "demo.json") for work in works
           for path in work.iterdir()):  # fmt: skip
        return "while it finished its output"
    return "between two writes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=200, help="total number of kills; demo runs only in every fourth round"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", help="only cases whose names start with one of these")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    make_small()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        world = Child(lambda: make_world(root), root / "world.log")
        assert run_all([world])[0].ended == "ok", world.outcome
        cases = [c for c in all_cases(root) if not options.cases or c.name.startswith(tuple(options.cases))]
        for case in cases:
            measure(case, root)
        number = 0
        while sum(case.counts["kills"] for case in cases) < options.kills:
            case, around = cases[number % len(cases)], number // len(cases)
            if case.job.command != "demo" or around % 4 == 0 or len(cases) == 1:
                faults = trial(case, root, random.Random(f"{options.seed} {case.name} {around}"))
                if faults:
                    print(f"{case.name}, round {around}: {'; '.join(faults)}", file=sys.stderr)
            number += 1
    finish(cases, options.out, options.seed)


def finish(cases: list[Case], out: Path | None, seed: int) -> None:
    """Print the tables, write the JSON, and exit with 1 if any trial was faulty."""
    kills = sum(case.counts["kills"] for case in cases)
    columns = ("trials", "kills", "same bytes", "faulty")
    table = Table("run", *columns, "seconds per run", title=f"{kills} kills")
    for case in cases:
        table.add_row(case.name, *(str(case.counts[column]) for column in columns), f"{case.seconds:.2f}")
    Console(width=120).print(table)
    moments = sum((case.moments for case in cases), Counter[str]())
    for when, count in moments.most_common():
        print(f"{count:5}  killed {when}")
    if out:
        runs = {case.name: {**case.counts, "seconds": case.seconds, "moments": dict(case.moments)} for case in cases}
        out.write_text(json.dumps({"device": "CPU", "seed": seed, "kills": kills, "runs": runs}, indent=1) + "\n")
    sys.exit(any(case.counts["faulty"] for case in cases))


if __name__ == "__main__":
    main()
