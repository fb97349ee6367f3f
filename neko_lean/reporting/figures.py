"""The report's charts, from scores.json and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from neko_lean.reporting import charts
from neko_lean.reporting.charts import UNIT_AXIS, Axis, Dot, Series
from neko_lean.reporting.values import mapping, mean, numbers, objects
from neko_lean.scoring import ATTACKS, SPLITS, Attack, cell_parts, interval, number, shown_cells

MAX_POINTS = 80  # of a curve; more steps are averaged, because single steps are noisy
MAX_NAME = 16  # characters of a group's name in a chart
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Model:
    """A scored model for charts and tables.

    Attributes:
        slot: its style; 0 is the model before unlearning.
        label: its name on the page.
        scores: the content of scores.json.
        run: the content of run.json, empty if the run is unknown.
        metrics: the lines of metrics.jsonl.
    """

    slot: int
    label: str
    scores: dict[str, Any]
    run: dict[str, Any]
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A chart with a heading and a note."""

    title: str
    note: str
    svg: Markup


def cell_figures(models: Sequence[Model]) -> list[Figure]:
    """The cells: one figure per split."""
    figures = []
    names = shown_cells([model.scores for model in models])
    for split, note, better in zip(
        SPLITS, ("lower is forgotten", "higher is preserved"), ("left", "right"), strict=True
    ):
        rows = []
        for cell in names:
            of_split, group, name = cell_parts(cell) or ("", "", "")
            if of_split == split:
                label = f"{_shortened(group)} {name}"
                rows.append((label, [dot for model in models if (dot := _cell_dot(model, cell))]))
        if not rows:
            continue
        title = f"{split.capitalize()} rows"
        figures.append(Figure(title, note, charts.dots(rows, f"{title}, {note}", better)))
    return figures


def _shortened(group: str) -> str:
    """A group's name, shortened to fit into a chart."""
    return group if len(group) <= MAX_NAME else f"{group[: MAX_NAME - 1]}…"


def _cell_dot(model: Model, cell: str) -> Dot | None:
    value = number(model.scores, "cells", cell)
    ends = interval(model.scores, "intervals", f"cells.{cell}")
    return None if value is None else Dot(model.slot, model.label, value, ends)


@dataclass(frozen=True)
class _Curve:
    """A curve of training: its value in a line of metrics.jsonl, and the y axis if it is fixed."""

    title: str
    note: str
    value: Callable[[dict[str, Any]], float | None]
    y_axis: Axis | None = None


def _logged(key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda line: number(line, key)


def _peak_memory(line: dict[str, Any]) -> float | None:
    """GiB. Files of older versions have another quantity, under another name, and no curve."""
    peak = number(line, "measured_peak")
    return None if peak is None else peak / 2**30


PEAK_MEMORY = _Curve(
    "Peak memory",
    "GiB so far, above what was in use before the run: allocated on the GPU, or the process's resident set on a CPU",
    _peak_memory,
)
CURVES = (
    _Curve("Forget loss", "nats; the recipe's own forget objective", _logged("forget_loss")),
    _Curve("Retain loss", "nats; KL divergence from the teacher, or cross-entropy", _logged("retain_loss")),
    _Curve("Forget exact match", "teacher-forced, on a fixed sample", _logged("eval_forget_exact"), UNIT_AXIS),
    _Curve("Retain exact match", "teacher-forced, on a fixed sample", _logged("eval_retain_exact"), UNIT_AXIS),
    _Curve("Retain KL", "nats, on a fixed sample", _logged("eval_retain_kl")),
    _Curve("Loss of forget answers", "nats, on a fixed sample", _logged("eval_forget_nll")),
    PEAK_MEMORY,
)


def training_figures(models: Sequence[Model]) -> list[Figure]:
    """The curves of all runs; a curve that no run logged is left out."""
    figures = []
    for curve in CURVES:
        series = [Series(model.slot, model.label, _points(model.metrics, curve.value)) for model in models]
        series = [line for line in series if line.points]
        if not series:
            continue
        y_axis = curve.y_axis
        if curve is PEAK_MEMORY:
            y_axis = charts.axis([y for line in series for _, y in line.points], zero=True, room=0.04)
        few = all(len(line.points) <= 25 for line in series)
        svg = charts.lines(series, f"{curve.title} over steps", "step", y=y_axis, marked=few)
        figures.append(Figure(curve.title, curve.note, svg))
    return figures


def _points(lines: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> Points:
    """A curve over steps, averaged to at most MAX_POINTS points."""
    points = [
        (step, y) for line in lines if (step := number(line, "step")) is not None and (y := value(line)) is not None
    ]
    count = len(points)
    if count <= MAX_POINTS:
        return points
    parts = [points[n * count // MAX_POINTS : (n + 1) * count // MAX_POINTS] for n in range(MAX_POINTS)]
    return [(mean([x for x, _ in part]) or 0.0, mean([y for _, y in part]) or 0.0) for part in parts]


def roc_figure(models: Sequence[Model]) -> Figure | None:
    """The ROC curve of the loss attack over all documents."""
    series = []
    for model in models:
        rates = (numbers(model.scores, "membership", "roc", name) for name in ("fpr", "tpr"))
        points = list(zip(*rates, strict=False))
        if points:
            series.append(Series(model.slot, model.label, points))
    if not series:
        return None
    svg = charts.lines(
        series,
        "ROC curve of the loss attack, true against false positive rate",
        "false positive rate",
        x=UNIT_AXIS,
        y=UNIT_AXIS,
        square=True,
        guides=[(0.0, 0.0, 1.0, 1.0)],
    )
    return Figure("The loss attack", "true against false positive rate", svg)


def letter_figure(models: Sequence[Model]) -> Figure | None:
    """The letters with which the models answer MMLU; a model that always answers A knows nothing."""
    groups = []
    for letter in "ABCD":
        shares = [(model, number(model.scores, "mmlu", "letters", letter)) for model in models]
        groups.append((letter, [Dot(model.slot, model.label, share) for model, share in shares if share is not None]))
    if not any(group for _, group in groups):
        return None
    svg = charts.bars(groups, "Share of MMLU answers by letter", "answer")
    return Figure("Answers by letter", "share of the model's answers; the correct ones are spread almost evenly", svg)


def attack_figures(models: Sequence[Model]) -> list[Figure]:
    """What attacks recover of the forget set: answers to the letter, and continuations."""
    kinds = (("knowledge", "answers to the letter"), ("regurgitation", "ROUGE-L recall of the continuation"))
    figures = [_attack_figure(models, attack, kind, note) for attack in ATTACKS.values() for kind, note in kinds]
    return [figure for figure in figures if figure]


def _attack_figure(models: Sequence[Model], attack: Attack, kind: str, note: str) -> Figure | None:
    curves = [(model, _attack_points(model, attack, kind)) for model in models]
    curves = [(model, points) for model, points in curves if points]
    if not curves:
        return None

    # Categories get one tick each, at equal distance, and fewer bits are further right.
    values: list[float] = sorted({x for _, points in curves for x, _ in points}, reverse=attack.x_key == "bits")
    if attack.x_is_category:
        x_axis = charts.named([f"{value:g}" for value in values])
        curves = [(model, [(float(values.index(x)), y) for x, y in points]) for model, points in curves]
    else:
        x_axis = charts.axis(values, zero=True)

    series = [Series(model.slot, model.label, points) for model, points in curves]
    svg = charts.lines(series, f"{attack.title}, {note}", attack.x_label, x=x_axis, y=UNIT_AXIS, marked=True)
    return Figure(attack.title, note, svg)


def _attack_points(model: Model, attack: Attack, kind: str) -> Points:
    points = []
    for point in objects(mapping(model.scores, "attacks"), attack.name):
        unicode = number(point, f"unicode_{kind}")  # older scores lack it
        x, y = number(point, attack.x_key), number(point, kind) if unicode is None else unicode
        if x is not None and y is not None:
            points.append((x, y))
    return sorted(points, reverse=attack.x_key == "bits")
