"""The tables of bench/peers.py, in Markdown: one per objective."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from peer_list import CONTENDERS, OBJECTIVES
from peer_runs import Run

HEADS = ("", "peak GiB", "x neko-lean", "real tokens/s", "neko-lean's speed-up", "reference pass", "cannot")


def table(results: dict[str, Any]) -> list[str]:
    """The lines of all tables, each with the comparison with the best contenders; the skipped; and the versions."""
    lines: list[str] = []
    for objective, runs in results["runs"].items():
        tokens = tokens_per_step(objective, results["tokens"])
        lines += [f"**{OBJECTIVES[objective]}**, {tokens} real tokens per step", ""]
        lines += ["| " + " | ".join(HEADS) + " |", "|---" + "|--:" * (len(HEADS) - 2) + "|---|"]
        lines += [row(name, rounds, runs["neko-lean"], tokens, results["teacher"]) for name, rounds in runs.items()]
        lines += ["", best(runs), ""]
    lines += [f"Skipped: {name}, because {reason}." for name, reason in results["skipped"].items() if reason]
    return [*lines, *versions(results["runs"])]


def tokens_per_step(objective: str, tokens: dict[str, int]) -> int:
    """Real tokens of the sequences that a step trains on."""
    sets = {"graddiff": ("forget", "retain"), "npo": ("forget", "retain"), "pairs": ("forget", "refusal")}
    return sum(tokens[name] for name in sets.get(objective, tuple(tokens)))


def row(name: str, rounds: Sequence[Run], ours: Sequence[Run], tokens: int, teacher: Run) -> str:
    """A contender's line: medians over rounds, and ratios within a round with their range."""
    if errors := [run.error for run in rounds if run.error]:
        return f"| {name} | failed: {errors[0]} |" + " |" * (len(HEADS) - 2)
    peak = gib(statistics.median(run.peak for run in rounds))
    speed = f"{tokens / statistics.median(seconds(run) for run in rounds):.1f}"
    ratios = ["", ""] if rounds is ours else [spread(ratios_of(rounds, ours, value)) for value in (peak_of, seconds)]
    cannot = next(contender.cannot for contender in CONTENDERS if contender.name == name)
    reference = reference_pass(rounds)
    if rounds is ours:
        reference = f"{teacher.seconds:.1f} s, {gib(teacher.peak)} GiB"  # the teacher cache, in a process before
    return f"| {name} | {peak} | {ratios[0]} | {speed} | {ratios[1]} | {reference} | {cannot} |"


def seconds(run: Run) -> float:
    """Median seconds of a step."""
    return statistics.median(run.step_seconds)


def peak_of(run: Run) -> float:
    return float(run.peak)


def ratios_of(rounds: Sequence[Run], ours: Sequence[Run], value: Callable[[Run], float]) -> list[float]:
    """A contender's value divided by ours, in each round in which both ran."""
    return [value(a) / value(b) for a, b in zip(rounds, ours, strict=True) if not (a.error or b.error)]


def spread(ratios: Sequence[float]) -> str:
    """The median, with the range if it is more than a point."""
    middle, low, high = (f"{ratio:.2f}" for ratio in (statistics.median(ratios), min(ratios), max(ratios)))
    return middle if low == high else f"{middle} ({low} to {high})"


def reference_pass(rounds: Sequence[Run]) -> str:
    """The seconds and the peak of a pass that precomputes reference log-probabilities; empty without one."""
    passes = [(run.reference_seconds, run.reference_peak) for run in rounds if run.reference_seconds is not None]
    if not passes:
        return ""
    return f"{statistics.median(s for s, _ in passes):.1f} s, {gib(max(peak or 0 for _, peak in passes))} GiB"


def best(runs: dict[str, list[Run]]) -> str:
    """How neko-lean compares with the contender of the smallest peak, and with the fastest."""
    ours = runs["neko-lean"]
    others = {
        name: rounds for name, rounds in runs.items() if name != "neko-lean" and not any(run.error for run in rounds)
    }
    if not others or any(run.error for run in ours):
        return "No contender to compare with."
    sentences = []
    for what, value in (("smallest peak", peak_of), ("fastest", seconds)):
        ratios = {name: ratios_of(rounds, ours, value) for name, rounds in others.items()}
        name = min(ratios, key=lambda name: statistics.median(ratios[name]))
        sentences.append(f"{what}: {name}, {spread(ratios[name])} x")
    return f"Best contenders, relative to neko-lean ({sentences[0]} its memory; {sentences[1]} its time)."


def versions(runs: dict[str, dict[str, list[Run]]]) -> list[str]:
    """A line per environment with its packages."""
    found = {
        name.partition(",")[0]: rounds[-1].versions
        for contenders in runs.values()
        for name, rounds in contenders.items()
        if rounds[-1].versions
    }
    return [f"{name}: " + ", ".join(f"{k} {v}" for k, v in packages.items()) for name, packages in found.items()]


def gib(number: float) -> str:
    return f"{number / 2**30:.2f}"
