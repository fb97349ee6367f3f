"""Which charts a report has, from what scores.json and metrics.jsonl hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from neko_lean.data import TASKS
from neko_lean.report import charts
from neko_lean.report.charts import SHARES, Axis, Dot, Series
from neko_lean.report.values import interval, mapping, mean, number, numbers, objects
from neko_lean.scoring import KINDS, SPLITS

POINTS = 80  # most points of a curve: single steps are noise, so more of them are averaged to so many


@dataclass(frozen=True)
class Model:
    """A scored model as charts and tables know it: its style and name, its scores.json, its run.json and metrics."""

    slot: int
    label: str
    scores: dict[str, Any]
    about: dict[str, Any]
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and what to know about it."""

    title: str
    note: str
    svg: Markup


def cell_figures(models: Sequence[Model]) -> list[Figure]:
    """The twelve numbers: a figure a split."""
    figures = []
    for split, note, better in zip(SPLITS, ("lower is forgotten", "higher is kept"), ("left", "right"), strict=True):
        rows = []
        for task in TASKS:
            for kind in KINDS.values():
                cell = f"{split}.{task}.{kind}"
                rows.append((f"{task} {kind}", [dot for one in models if (dot := _dot(one, cell))]))
        title = f"{split.capitalize()} rows"
        figures.append(Figure(title, note, charts.dots(rows, f"{title}, {note}", better)))
    return figures


def _dot(model: Model, cell: str) -> Dot | None:
    value = number(model.scores, "cells", cell)
    ends = interval(model.scores, "intervals", f"cells.{cell}")
    return None if value is None else Dot(model.slot, model.label, value, ends)


def training_figures(models: Sequence[Model]) -> list[Figure]:
    """The curves of every run, each only where some run logged it."""
    memory: Callable[[dict[str, Any]], float | None] = _memory
    wanted: list[tuple[str, str, Callable[[dict[str, Any]], float | None], Axis | None]] = [
        ("Forget loss", "nats; what the recipe pushes, each its own", _logged("forget_loss"), None),
        ("Retain loss", "nats; KL to the teacher, or cross-entropy", _logged("retain_loss"), None),
        ("Forget exact match", "teacher-forced, on a fixed sample", _logged("eval_forget_exact"), SHARES),
        ("Retain exact match", "teacher-forced, on a fixed sample", _logged("eval_retain_exact"), SHARES),
        ("Retain KL", "nats, on a fixed sample", _logged("eval_retain_kl"), None),
        ("Forget answers' loss", "nats, on a fixed sample", _logged("eval_forget_nll"), None),
        ("Peak memory", "GiB so far: of the GPU by PyTorch, without one of the process", memory, None),
    ]
    figures = []
    for title, note, value, up in wanted:
        series = [Series(one.slot, one.label, _curve(one.metrics, value)) for one in models]
        series = [one for one in series if one.points]
        if series:
            few = all(len(one.points) <= 25 for one in series)
            if title == "Peak memory":
                up = charts.axis([y for one in series for _, y in one.points], zero=True, room=0.04)
            svg = charts.lines(series, f"{title} over steps", "step", y=up, marked=few)
            figures.append(Figure(title, note, svg))
    return figures


def _logged(key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda line: number(line, key)


def _memory(line: dict[str, Any]) -> float | None:
    peak = number(line, "peak_memory", "allocated") or number(line, "peak_memory", "process")
    return None if peak is None else peak / 2**30


def _curve(
    lines: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]
) -> list[tuple[float, float]]:
    found = [
        (step, y) for line in lines if (step := number(line, "step")) is not None and (y := value(line)) is not None
    ]
    if len(found) <= POINTS:
        return found
    parts = [found[n * len(found) // POINTS : (n + 1) * len(found) // POINTS] for n in range(POINTS)]
    return [(mean([x for x, _ in part]) or 0.0, mean([y for _, y in part]) or 0.0) for part in parts]


def roc_figure(models: Sequence[Model]) -> Figure | None:
    """The loss attack's ROC over all documents."""
    series = []
    for one in models:
        points = list(
            zip(
                numbers(one.scores, "membership", "roc", "fpr"),
                numbers(one.scores, "membership", "roc", "tpr"),
                strict=False,
            )
        )
        if points:
            series.append(Series(one.slot, one.label, points))
    if not series:
        return None
    svg = charts.lines(
        series,
        "ROC of the loss attack, true against false positive rate",
        "unseen documents called members",
        x=SHARES,
        y=SHARES,
        square=True,
        guides=[(0.0, 0.0, 1.0, 1.0)],
    )
    return Figure("The loss attack", "share of forgotten documents found, against share of unseen ones accused", svg)


def letter_figure(models: Sequence[Model]) -> Figure | None:
    """Which letters the model answers MMLU with: one that always says A knows nothing."""
    groups = []
    for letter in "ABCD":
        found = [(one, number(one.scores, "mmlu", "letters", letter)) for one in models]
        groups.append((letter, [Dot(one.slot, one.label, value) for one, value in found if value is not None]))
    if not any(group for _, group in groups):
        return None
    svg = charts.bars(groups, "Share of MMLU answers by letter", "answer")
    return Figure("Answers by letter", "share of its answers; the truth is spread almost evenly", svg)


def attack_figures(models: Sequence[Model]) -> list[Figure]:
    """What attacks bring back of the forget rows: answers to the letter, and continuations."""
    figures = []
    kinds = (("knowledge", "answers to the letter"), ("regurgitation", "ROUGE-L recall of the continuation"))
    for attack, title, key, x_label in (
        ("relearn", "Relearning", "steps", "steps of training on a few forget rows"),
        ("quantize", "Quantising", "bits", "bits a weight"),
        ("prefix", "Prompting with the answer's start", "tokens", "tokens of the answer given"),
        ("paraphrase", "Asking in other words", "paraphrase", "wording"),
    ):
        for kind, note in kinds:
            found = [(one, _attack(one, attack, key, kind)) for one in models]
            found = [(one, points) for one, points in found if points]
            if not found:
                continue
            places: list[float] = sorted({x for _, points in found for x, _ in points}, reverse=attack == "quantize")
            # Bits and wordings are names more than amounts: one tick each, at equal distance.
            names = attack in ("quantize", "paraphrase")
            across = charts.named([f"{place:g}" for place in places]) if names else charts.axis(places, zero=True)
            series = [
                Series(one.slot, one.label, [(float(places.index(x)) if names else x, y) for x, y in points])
                for one, points in found
            ]
            svg = charts.lines(series, f"{title}, {note}", x_label, x=across, y=SHARES, marked=True)
            figures.append(Figure(title, note, svg))
    return figures


def _attack(model: Model, attack: str, key: str, kind: str) -> list[tuple[float, float]]:
    points = []
    for one in objects(mapping(model.scores, "attacks"), attack):
        seen = number(one, f"unicode_{kind}")  # in any script; older scores have none
        x, y = number(one, key), number(one, kind) if seen is None else seen
        if x is not None and y is not None:
            points.append((x, y))
    return sorted(points, reverse=attack == "quantize")
