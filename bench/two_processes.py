"""Two processes on one output, at random, for each command that writes: who wins, and what is left.

    .venv/bin/python bench/two_processes.py --trials 200 --out two-processes.json

A trial draws what lies at the output before (nothing, an output of a third run, a user's file or folder, what a killed
run left), the two processes' options, --resume and --overwrite, when the second one starts, and for half of the trials
that one of them is stopped for a while or killed, at a random time or before a random operation on a file. Afterwards
the output has to be that of an undisturbed run of one of the two, byte for byte except for times, or what was there
before; who lost ended in one sentence; and runs with --resume complete it and leave nothing behind that no sentence
named. Needs Linux or macOS (fork).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Child, Moment, Outcome, run_all
from rich.console import Console
from rich.table import Table
from small_jobs import COMMANDS, Job, fingerprint, jobs, make_small, make_world

from neko_lean.cache import inspect_cache

MIXED = "two commands"
BEFORE = ("nothing", "an output", "a user's file", "a user's folder", "a killed run", "a stranger in the work folder")
ODDS = (55, 20, 5, 5, 12, 3)
WORK = {"cache-teacher": "partial", "score": "partial", "report": "partial", "demo": "demo"}  # others: saved
USER = "chapter one\n"
LOST = "but no plan.json"  # of a work folder whose plan was cleared away already


@dataclass
class Known:
    """What an undisturbed run of a job makes and takes."""

    folder: Path
    digest: str
    value: Any
    seconds: float
    operations: int


@dataclass
class Trial:
    """One output and all that happens to it."""

    folder: Path  # holds the output and what is next to it
    logs: Path
    before: str
    third: Job  # of an output or a killed run that is there before
    pair: list[tuple[Job, dict[str, bool]]]
    told: list[str] = field(default_factory=list)  # every sentence
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def users(self) -> Path:
        """The user's own file, where there is one."""
        work = self.folder / f".out.{WORK.get(self.pair[0][0].command, 'saved')}"
        places = {"a user's file": self.out, "a user's folder": self.out / "thesis.txt"}
        return places.get(self.before, work / "thesis.txt")

    def child(self, job: Job, flags: dict[str, bool], **more: Any) -> Child:
        log = self.logs / f"{len(self.told)}-{len(list(self.logs.iterdir()))}-{random.random()}"
        out = self.out
        return Child(lambda: job(out, **flags), log, str(self.folder), **more)

    def heard(self, job: Job, flags: dict[str, bool], outcome: Outcome, known: dict[Job, Known]) -> Outcome:
        """Note how a process ended, and what is wrong with that in itself."""
        self.told += [outcome.printed, outcome.sentence]
        self.story.append(f"{job.name} {sorted(k for k in flags if flags[k])}: {outcome.ended} {outcome.sentence}")
        if outcome.ended == "crashed":
            self.faults.append(f"traceback: {outcome.sentence} {outcome.printed[-2000:]}")
            self.counts["tracebacks"] += 1
        if outcome.ended == "refused" and ("\n" in outcome.sentence or not outcome.sentence.endswith(".")):
            self.faults.append(f"no sentence: {outcome.sentence!r}")
            self.counts["other faults"] += 1
        if outcome.ended == "ok" and outcome.value != known[job].value:
            self.faults.append(f"{job.name} told another run's numbers")
            self.counts["wrong numbers"] += 1
        return outcome


def prepare(trial: Trial, known: dict[Job, Known], rng: random.Random) -> None:
    """Put there what the trial finds."""
    trial.folder.mkdir()
    trial.logs.mkdir()
    third = known[trial.third]
    if trial.before == "an output":
        copy = shutil.copyfile if third.folder.is_file() else shutil.copytree
        copy(third.folder, trial.out)  # type: ignore[operator]
    elif trial.before.startswith(("a user", "a stranger")):
        trial.users.parent.mkdir(exist_ok=True)
        trial.users.write_text(USER)
    elif trial.before == "a killed run":
        moment = Moment.drawn(rng, third.seconds, third.operations)
        run_all([trial.child(trial.third, {}, kill=moment)])
        if fingerprint(trial.out) is not None:
            trial.before = "an output"


def disturb(trial: Trial, known: dict[Job, Known], rng: random.Random) -> list[Outcome]:
    """Run the two, with what is drawn for them."""
    longest = max(known[job].seconds for job, _ in trial.pair)
    children = [trial.child(job, flags) for job, flags in trial.pair]
    children[1].start = rng.choice((0.0, rng.uniform(0, longest), rng.uniform(0.5, 1) * longest))
    what = rng.choice(("nothing", "nothing", "stop", "stop", "kill", "both"))
    for kind in ("stop", "kill"):
        if what in (kind, "both"):
            chosen = rng.randrange(2)
            one = known[trial.pair[chosen][0]]
            setattr(children[chosen], kind, Moment.drawn(rng, one.seconds, one.operations))
            trial.story.append(f"{kind} of {chosen}: {getattr(children[chosen], kind)}")
    for child in children:
        child.stopped_for = rng.choice((float("inf"), rng.uniform(0, 2) * longest))
    trial.story.append(f"second starts after {children[1].start:.3f}")
    found = run_all(children)
    return [trial.heard(*pair, one, known) for pair, one in zip(trial.pair, found, strict=True)]


def judge(trial: Trial, outcomes: list[Outcome], known: dict[Job, Known], at_first: str | None) -> None:
    """What the two left at the output itself."""
    found = fingerprint(trial.out)
    won = [job for (job, _), one in zip(trial.pair, outcomes, strict=True) if one.ended == "ok"]
    killed = [job for (job, _), one in zip(trial.pair, outcomes, strict=True) if one.ended == "killed"]
    overwrite = any(flags["overwrite"] for _, flags in trial.pair)
    trial.counts["wins"] += len(won)
    trial.counts["refusals"] += sum(one.ended == "refused" for one in outcomes)
    trial.counts["killed"] += len(killed)
    allowed = {known[job].digest for job in [*won, *killed]}
    if not won:
        allowed.add(at_first)  # type: ignore[arg-type]
    if killed and overwrite:
        allowed.add(None)  # type: ignore[arg-type] # moved aside for a moment
    if at_first is not None and (trial.before.startswith("a user") or not overwrite):
        allowed = {at_first}
    if found not in allowed:
        trial.faults.append(f"the output is {name_of(found, known)}; won: {[job.name for job in won]}")
        trial.counts["wrong bytes"] += 1
    if len(set(won)) > 1 and not overwrite:
        trial.faults.append(f"both of {[job.name for job in won]} ended well, and none overwrites")
        trial.counts["other faults"] += 1


def follow(trial: Trial, known: dict[Job, Known], at_first: str | None) -> None:
    """Every job again with --resume: one of them has to complete the output, and nothing else may be left."""
    again: dict[Job, dict[str, bool]] = {}
    owners = [*trial.pair, *([(trial.third, {"overwrite": False})] if trial.before == "a killed run" else [])]
    for job, flags in owners:
        overwrite = flags["overwrite"] or again.get(job, {"overwrite": False})["overwrite"]
        again[job] = {"resume": True, "overwrite": overwrite}
    ends = {}
    for job, flags in again.items():
        # A file cannot be resumed: it is made again.
        given = {"overwrite": True} if job.command in ("report", "demo") else flags
        ends[job] = trial.heard(job, given, run_all([trial.child(job, given)])[0], known)
    found = fingerprint(trial.out)
    mine = trial.before.startswith("a user") or trial.before.startswith("a stranger")
    blocked = mine or (at_first is not None and not any(flags["overwrite"] for flags in again.values()))
    completed = any(one.ended == "ok" for one in ends.values())
    if not completed and not blocked and any(LOST in one.sentence for one in ends.values()):
        # Killed while it cleared away what another run had left: nothing can go on from that.
        job, given = trial.pair[0][0], {"overwrite": True}
        ends[job] = trial.heard(job, given, run_all([trial.child(job, given)])[0], known)
        completed = ends[job].ended == "ok"
        found = fingerprint(trial.out)
        trial.counts["begun anew"] += completed
    if not completed and not blocked:
        trial.faults.append("no run with --resume completes it")
        trial.counts["not completed"] += 1
    if completed and found not in {known[job].digest for job in ends}:
        trial.faults.append(f"after --resume the output is {name_of(found, known)}")
        trial.counts["wrong bytes"] += 1
    if mine and (not trial.users.is_file() or trial.users.read_text() != USER):
        trial.faults.append("the user's file is not what it was")
        trial.counts["wrong bytes"] += 1
    said = "\n".join(trial.told)
    expected = {trial.out.name, *([trial.users.parent.name] if mine else [])}
    waiting = unfinished_of_others(ends)
    left = sorted({path.name for path in trial.folder.iterdir()} - expected)
    left = [name for name in left if name not in said and not waiting(name)]
    if left:
        trial.faults.append(f"left behind: {left}")
        trial.counts["left behind"] += 1
    if completed and (trial.out / "manifest.json").is_file():
        inspect_cache(trial.out, verify=True)


def unfinished_of_others(ends: dict[Job, Outcome]) -> Callable[[str], bool]:
    """Whether a name is that of what a command left that may yet go on, once another command's output is moved out of
    its way: a work folder, or of a report the temporary file."""
    done = {job.command for job, one in ends.items() if one.ended == "ok"}
    waiting = {job.command for job, one in ends.items() if one.ended == "refused"} - done
    cleared = {WORK.get(command, "saved") for command in done - {"report"}}
    folders = {f".out.{kind}" for kind in {WORK.get(command, "saved") for command in waiting} - cleared}

    def expected(name: str) -> bool:
        temporary = "report" in waiting and re.fullmatch(r"\.out\.\d+\.tmp", name) is not None
        return bool(done) and (name in folders or temporary)

    return expected


def name_of(digest: str | None, known: dict[Job, Known]) -> str:
    """Which job's output this is."""
    if digest is None:
        return "absent"
    return next((job.name for job, one in known.items() if one.digest == digest), "of no job")


def undisturbed(root: Path, of: dict[str, list[Job]], commands: list[str]) -> dict[Job, Known]:
    """Run every job twice: what it makes, and that it makes the same again."""
    known = {}
    for job in [job for command in commands for job in of[command]]:
        pair = []
        for number in range(2):
            folder, logs = root / f"{job.command}-{job.number}-{number}", root / f"logs-{job.command}"
            folder.mkdir()
            logs.mkdir(exist_ok=True)
            child = Child(lambda j=job, f=folder: j(f / "out"), logs / folder.name, str(folder))  # type: ignore[misc]
            start = time.monotonic()
            one = run_all([child])[0]
            taken = time.monotonic() - start
            assert one.ended == "ok", f"{job.name}: {one.sentence} {one.printed}"
            digest = fingerprint(folder / "out")
            assert digest is not None
            pair.append(Known(folder / "out", digest, one.value, taken, one.operations))
            assert [path.name for path in folder.iterdir()] == ["out"]
        assert pair[0].digest == pair[1].digest, f"{job.name} is not the same from run to run"
        assert pair[0].value == pair[1].value, f"{job.name} does not tell the same from run to run"
        known[job] = pair[1]
    return known


def draw(rng: random.Random, root: Path, number: int, command: str, of: dict[str, list[Job]]) -> Trial:
    """A trial, nothing of it run yet."""
    if command == MIXED:
        kinds = rng.sample([name for name in COMMANDS if name in of and name != "demo"], 2)
    else:
        kinds = [command, command]
    first, second = (rng.choice(of[kind]) for kind in kinds)
    if command != MIXED and rng.random() < 0.5:
        second = first
    flags = [{"resume": rng.random() < 0.4, "overwrite": rng.random() < 0.4} for _ in range(2)]
    before = rng.choices(BEFORE, ODDS)[0]
    third = rng.choice(of[rng.choice(kinds)])
    pair = list(zip((first, second), flags, strict=True))
    return Trial(root / f"trial{number}", root / f"logs{number}", before, third, pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="of each command; of demo a tenth")
    parser.add_argument("--commands", nargs="+", default=[*COMMANDS, MIXED])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one trial by its number, and its story")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    make_small()
    totals: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        world = Child(lambda: make_world(root), root / "world.log")
        assert run_all([world])[0].ended == "ok", world.outcome
        of = jobs(root)
        wanted = [c for c in of if c in options.commands or (MIXED in options.commands and c != "demo")]
        known = undisturbed(root, of, wanted)
        for command in options.commands:
            totals[command] = counts = Counter()
            for number in range(options.trials // 10 if command == "demo" else options.trials):
                if options.only is not None and number != options.only:
                    continue
                rng = random.Random(f"{options.seed} {command} {number}")
                trial = draw(rng, root, number, command, of)
                prepare(trial, known, rng)
                at_first = fingerprint(trial.out)
                judge(trial, disturb(trial, known, rng), known, at_first)
                follow(trial, known, at_first)
                counts += trial.counts
                counts["trials"] += 1
                counts["faulty trials"] += bool(trial.faults)
                if trial.faults or options.only is not None:
                    story = "\n    ".join([f"before: {trial.before} ({trial.third.name})", *trial.story])
                    print(f"{command}, trial {number}: {'; '.join(trial.faults)}\n    {story}", file=sys.stderr)
                shutil.rmtree(trial.folder)
                shutil.rmtree(trial.logs)
    finish(totals, options.out, options.seed)


def finish(totals: dict[str, Counter[str]], out: Path | None, seed: int) -> None:
    """Print the table, write the JSON, and end with 1 where there was a fault."""
    columns = ("trials", "wins", "refusals", "killed", "wrong bytes", "wrong numbers", "tracebacks", "left behind")
    columns += ("begun anew", "not completed", "other faults")
    table = Table("command", *columns, title="two processes on one output")
    for command, counts in totals.items():
        table.add_row(command, *(str(counts[column]) for column in columns))
    Console(width=170).print(table)
    if out:
        found = {command: dict(counts) for command, counts in totals.items()}
        out.write_text(json.dumps({"device": "CPU", "seed": seed, "commands": found}, indent=1) + "\n")
    sys.exit(any(counts["faulty trials"] for counts in totals.values()))


if __name__ == "__main__":
    main()
