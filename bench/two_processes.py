"""Start two processes on one output, at random, for each command that writes: who succeeds, and what is left?

    .venv/bin/python bench/two_processes.py --trials 200 --out two-processes.json

A trial draws what is at the output before (nothing, the output of a third run, a user's file or folder, the remains of
a killed run), the options of both processes, --resume and --overwrite, and when the second one starts. In half of the
trials, one process is suspended for a while or killed, at a random time or before a random file operation. Afterwards
the output must be that of an undisturbed run of one of the two, byte for byte except for times, or what was there
before. The process that lost must end with one sentence. Runs with --resume must complete the output and leave no file
that no message named. Needs Linux or macOS (fork).
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
from pathlib import Path

from processes import Child, Moment, Outcome, run_all
from rich.console import Console
from rich.table import Table
from small_jobs import COMMANDS, Job, fingerprint, jobs, make_small, make_world
from trials import USER, WORK, Known, Trial

from neko_lean.cache import inspect_cache

MIXED = "two commands"
BEFORE = ("nothing", "an output", "a user's file", "a user's folder", "a killed run", "a stranger in the work folder")
ODDS = (55, 20, 5, 5, 12, 3)
LOST = "but no plan.json"  # the error for a work folder whose plan has already been removed


def prepare(trial: Trial, known: dict[Job, Known], rng: random.Random) -> None:
    """Create what the trial finds at its output."""
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
    """Run both processes; draw when the second starts and whether one is stopped or killed."""
    longest = max(known[job].seconds for job, _ in trial.pair)
    children = [trial.child(job, flags) for job, flags in trial.pair]
    children[1].start = rng.choice((0.0, rng.uniform(0, longest), rng.uniform(0.5, 1) * longest))
    disturbance = rng.choice(("nothing", "nothing", "stop", "stop", "kill", "both"))
    for kind in ("stop", "kill"):
        if disturbance in (kind, "both"):
            victim = rng.randrange(2)
            run = known[trial.pair[victim][0]]
            moment = Moment.drawn(rng, run.seconds, run.operations)
            setattr(children[victim], kind, moment)
            trial.story.append(f"{kind} process {victim}: {moment}")
    for child in children:
        child.stopped_for = rng.choice((float("inf"), rng.uniform(0, 2) * longest))
    trial.story.append(f"second starts after {children[1].start:.3f}")
    outcomes = run_all(children)
    return [trial.record(*pair, outcome, known) for pair, outcome in zip(trial.pair, outcomes, strict=True)]


def judge(trial: Trial, outcomes: list[Outcome], known: dict[Job, Known], at_first: str | None) -> None:
    """Check the output after both processes have ended."""
    digest = fingerprint(trial.out)
    ended = [(job, outcome.ended) for (job, _), outcome in zip(trial.pair, outcomes, strict=True)]
    winners = [job for job, end in ended if end == "ok"]
    killed = [job for job, end in ended if end == "killed"]
    overwrite = any(flags["overwrite"] for _, flags in trial.pair)
    trial.counts["wins"] += len(winners)
    trial.counts["refusals"] += sum(end == "refused" for _, end in ended)
    trial.counts["killed"] += len(killed)
    # Which outputs may be there.
    allowed = {known[job].digest for job in [*winners, *killed]}
    if not winners:
        allowed.add(at_first)  # type: ignore[arg-type]
    if killed and overwrite:
        allowed.add(None)  # type: ignore[arg-type] # the old output is moved aside for a moment
    if at_first is not None and (trial.before.startswith("a user") or not overwrite):
        allowed = {at_first}
    if digest not in allowed:
        trial.faults.append(f"the output is {name_of(digest, known)}; succeeded: {[job.name for job in winners]}")
        trial.counts["wrong bytes"] += 1
    if len(set(winners)) > 1 and not overwrite:
        trial.faults.append(f"both of {[job.name for job in winners]} succeeded without --overwrite")
        trial.counts["other faults"] += 1


def follow(trial: Trial, known: dict[Job, Known], at_first: str | None) -> None:
    """Run every job again with --resume: one of them must complete the output, and nothing else may be left over."""
    # Which options each job gets this time.
    again: dict[Job, dict[str, bool]] = {}
    owners = [*trial.pair, *([(trial.third, {"overwrite": False})] if trial.before == "a killed run" else [])]
    for job, flags in owners:
        overwrite = flags["overwrite"] or again.get(job, {"overwrite": False})["overwrite"]
        again[job] = {"resume": True, "overwrite": overwrite}

    ends = {}
    for job, flags in again.items():
        # A report or demo cannot be resumed and is made again.
        options = {"overwrite": True} if job.command in ("report", "demo") else flags
        ends[job] = trial.record(job, options, run_all([trial.child(job, options)])[0], known)
    digest = fingerprint(trial.out)
    mine = trial.before.startswith("a user") or trial.before.startswith("a stranger")
    blocked = mine or (at_first is not None and not any(flags["overwrite"] for flags in again.values()))
    completed = any(outcome.ended == "ok" for outcome in ends.values())

    if not completed and not blocked and any(LOST in outcome.sentence for outcome in ends.values()):
        # It was killed while it removed what another run had left, so nothing can be resumed.
        job, options = trial.pair[0][0], {"overwrite": True}
        ends[job] = trial.record(job, options, run_all([trial.child(job, options)])[0], known)
        completed = ends[job].ended == "ok"
        digest = fingerprint(trial.out)
        trial.counts["restarted"] += completed
    if not completed and not blocked:
        trial.faults.append("no run with --resume completes the output")
        trial.counts["not completed"] += 1
    if completed and digest not in {known[job].digest for job in ends}:
        trial.faults.append(f"after --resume the output is {name_of(digest, known)}")
        trial.counts["wrong bytes"] += 1
    if mine and (not trial.users.is_file() or trial.users.read_text() != USER):
        trial.faults.append("the user's file was changed")
        trial.counts["wrong bytes"] += 1

    # Files that are neither expected nor named in a message.
    messages = "\n".join(trial.messages)
    expected = {trial.out.name, *([trial.users.parent.name] if mine else [])}
    waiting = may_be_left(ends)
    left = sorted({path.name for path in trial.folder.iterdir()} - expected)
    left = [name for name in left if name not in messages and not waiting(name)]
    if left:
        trial.faults.append(f"leftover files: {left}")
        trial.counts["leftover files"] += 1
    if completed and (trial.out / "manifest.json").is_file():
        inspect_cache(trial.out, verify=True)


def may_be_left(ends: dict[Job, Outcome]) -> Callable[[str], bool]:
    """A function that says whether a file of this name may be left over: the work folder (for a report, the temporary
    file) of a command that can still continue after another command's output is moved out of its way."""
    done = {job.command for job, outcome in ends.items() if outcome.ended == "ok"}
    waiting = {job.command for job, outcome in ends.items() if outcome.ended == "refused"} - done
    cleared = {WORK.get(command, "saved") for command in done - {"report"}}
    folders = {f".out.{kind}" for kind in {WORK.get(command, "saved") for command in waiting} - cleared}

    def expected(name: str) -> bool:
        temporary = "report" in waiting and re.fullmatch(r"\.out\.\d+\.tmp", name) is not None
        return bool(done) and (name in folders or temporary)

    return expected


def name_of(digest: str | None, known: dict[Job, Known]) -> str:
    """The name of the job whose output has this digest."""
    if digest is None:
        return "absent"
    return next((job.name for job, run in known.items() if run.digest == digest), "of no job")


def undisturbed(root: Path, of: dict[str, list[Job]], commands: list[str]) -> dict[Job, Known]:
    """Run every job twice, record its output, and check that both runs agree."""
    known = {}
    for job in [job for command in commands for job in of[command]]:
        pair = []
        for number in range(2):
            folder, logs = root / f"{job.command}-{job.number}-{number}", root / f"logs-{job.command}"
            folder.mkdir()
            logs.mkdir(exist_ok=True)
            child = Child(lambda j=job, f=folder: j(f / "out"), logs / folder.name, str(folder))  # type: ignore[misc]
            start = time.monotonic()
            outcome = run_all([child])[0]
            seconds = time.monotonic() - start
            assert outcome.ended == "ok", f"{job.name}: {outcome.sentence} {outcome.printed}"
            digest = fingerprint(folder / "out")
            assert digest is not None
            pair.append(Known(folder / "out", digest, outcome.value, seconds, outcome.operations))
            assert [path.name for path in folder.iterdir()] == ["out"]
        assert pair[0].digest == pair[1].digest, f"{job.name}: two undisturbed runs gave different bytes"
        assert pair[0].value == pair[1].value, f"{job.name}: two undisturbed runs returned different numbers"
        known[job] = pair[1]
    return known


def draw(rng: random.Random, root: Path, number: int, command: str, of: dict[str, list[Job]]) -> Trial:
    """Draw a trial without running any of it."""
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
    parser.add_argument("--trials", type=int, default=200, help="trials per command; demo gets a tenth of them")
    parser.add_argument("--commands", nargs="+", default=[*COMMANDS, MIXED])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run only the trial with this number and print its story")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    make_small()
    totals: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        world = Child(lambda: make_world(root), root / "world.log")
        assert run_all([world])[0].ended == "ok", world.outcome
        by_command = jobs(root)
        commands = [c for c in by_command if c in options.commands or (MIXED in options.commands and c != "demo")]
        known = undisturbed(root, by_command, commands)
        for command in options.commands:
            totals[command] = counts = Counter()
            for number in range(options.trials // 10 if command == "demo" else options.trials):
                if options.only is not None and number != options.only:
                    continue
                rng = random.Random(f"{options.seed} {command} {number}")
                trial = draw(rng, root, number, command, by_command)
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
    """Print the table, write the JSON, and exit with 1 if any trial was faulty."""
    columns = ("trials", "wins", "refusals", "killed", "wrong bytes", "wrong numbers", "tracebacks", "leftover files")
    columns += ("restarted", "not completed", "other faults")
    table = Table("command", *columns, title="two processes on one output")
    for command, counts in totals.items():
        table.add_row(command, *(str(counts[column]) for column in columns))
    Console(width=170).print(table)
    if out:
        commands = {command: dict(counts) for command, counts in totals.items()}
        out.write_text(json.dumps({"device": "CPU", "seed": seed, "commands": commands}, indent=1) + "\n")
    sys.exit(any(counts["faulty trials"] for counts in totals.values()))


if __name__ == "__main__":
    main()
