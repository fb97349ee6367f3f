"""The report's charts, from scores.json and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from neko_lean.reporting import charts
from neko_lean.reporting.charts import UNIT_AXIS, Axis, Dot, Series
from neko_lean.reporting.values import join_words, mapping, mean, numbers, objects, text
from neko_lean.scoring import ATTACKS, SPLITS, Attack, interval, number, relearned_losses, shown_cells
from neko_lean.scoring.names import cell_group, cell_noun

MAX_POINTS = 80  # of a curve; more steps are averaged, because single steps are noisy
MAX_NAME = 16  # characters of a group's name in a chart
QUESTIONS_AXIS, TEXTS_AXIS = "share answered to the letter", "ROUGE-L recall of the true text"
LEAKS_AXIS = "share that leaks in any sample"
# Names of an attack's categories, where the numbers in the scores say nothing.
CATEGORY_NAMES = {"paraphrase": {0.0: "original", 1.0: "paraphrased"}}
CATEGORY_AXES = {"paraphrase": "prompt"}
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
    """A chart with a heading, a note, and a sentence on the models that are not in it."""

    title: str
    note: str
    svg: Markup
    absent: str = ""


def _absent_models(models: Sequence[Model], drawn: Sequence[Model]) -> str:
    """A sentence on the models that a chart does not show, because their scores lack its values."""
    missing = [model.label for model in models if model not in drawn]
    return f"Not measured for {join_words(missing)}." if missing else ""


def cell_figures(models: Sequence[Model]) -> list[Figure]:
    """The cells: one figure for the questions, and one for the texts, of each split."""
    names = shown_cells([model.scores for model in models])
    nouns = sorted({cell_noun(name) for name in names}, key=("questions", "documents", "texts").index)
    figures = []
    for split, note, better in zip(SPLITS, ("lower is forgotten", "higher is kept"), ("left", "right"), strict=True):
        for noun in nouns:
            cells = [name for name in names if name.startswith(f"{split}.") and cell_noun(name) == noun]
            figures.append(_cell_figure(models, cells, f"{split.capitalize()} set, {noun}", note, better))
    return [figure for figure in figures if figure]


def _cell_figure(models: Sequence[Model], cells: Sequence[str], title: str, note: str, better: str) -> Figure | None:
    """A chart of cells of one split and kind; None if no model has a value."""
    dots = {cell: [(model, dot) for model in models if (dot := _cell_dot(model, cell))] for cell in cells}
    rows = [
        (_shortened(cell_group(cell) or cell_noun(cell)), [dot for _, dot in found])
        for cell, found in dots.items()
        if found
    ]
    if not rows:
        return None
    x_label = QUESTIONS_AXIS if cell_noun(cells[0]) == "questions" else TEXTS_AXIS
    drawn = [model for found in dots.values() for model, _ in found]
    svg = charts.dots(rows, f"{title}, {note}: {x_label}", x_label, better)
    return Figure(title, note, svg, _absent_models(models, drawn))


def interval_note(models: Sequence[Model]) -> str:
    """A sentence on the models whose cells are drawn without intervals."""
    names = shown_cells([model.scores for model in models])
    without = [
        model.label
        for model in models
        if (dots := [dot for cell in names if (dot := _cell_dot(model, cell))])
        and all(dot.ends is None for dot in dots)
    ]
    return f"No intervals for {join_words(without)}: the scores have none." if without else ""


def _shortened(group: str) -> str:
    """A group's name, shortened to fit into a chart."""
    return group if len(group) <= MAX_NAME else f"{group[: MAX_NAME - 1]}…"


def _cell_dot(model: Model, cell: str) -> Dot | None:
    value = number(model.scores, "cells", cell)
    ends = interval(model.scores, "intervals", f"cells.{cell}")
    return None if value is None else Dot(model.slot, model.label, value, ends)


@dataclass(frozen=True)
class _Curve:
    """A curve of training: its value in a line of metrics.jsonl, its unit, and the y axis if it is fixed."""

    title: str
    note: str
    value: Callable[[dict[str, Any]], float | None]
    unit: str = ""
    y_axis: Axis | None = None


def _logged(key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda line: number(line, key)


def _peak_memory(line: dict[str, Any]) -> float | None:
    """GiB. Files of older versions have another quantity, under another name, and no curve."""
    peak = number(line, "measured_peak")
    return None if peak is None else peak / 2**30


PEAK_MEMORY = _Curve(
    "Peak memory",
    "so far, above what was in use before the run: allocated on the GPU, or the process's resident set on a CPU",
    _peak_memory,
    "GiB",
)
SAMPLE = "a fixed sample, in the recipe's own prompt format"  # which may differ from that of the scores
EXACT = f"every token of the true answer is the most likely one; {SAMPLE}"
LOGGED_CURVES = (
    _Curve(
        "Forget loss", "each recipe's own objective: two recipes' values do not compare", _logged("forget_loss"), "nats"
    ),
    _Curve("Retain loss", "KL divergence from the teacher, or cross-entropy", _logged("retain_loss"), "nats"),
    PEAK_MEMORY,
)
SAMPLE_CURVES = (
    _Curve("Teacher-forced answers, forget set", EXACT, _logged("eval_forget_exact"), "share of answers", UNIT_AXIS),
    _Curve("Teacher-forced answers, retain set", EXACT, _logged("eval_retain_exact"), "share of answers", UNIT_AXIS),
    _Curve("KL divergence, retain set", f"from the teacher; {SAMPLE}", _logged("eval_retain_kl"), "nats"),
    _Curve("Loss of the answers, forget set", SAMPLE, _logged("eval_forget_nll"), "nats per token"),
)


def training_figures(models: Sequence[Model]) -> list[Figure]:
    """The curves of all runs; a curve that no run logged is left out."""
    figures = [_training_figure(models, curve) for curve in (*LOGGED_CURVES, *SAMPLE_CURVES)]
    return [figure for figure in figures if figure]


def _training_figure(models: Sequence[Model], curve: _Curve) -> Figure | None:
    curves = [(model, _points(model.metrics, curve.value)) for model in models]
    curves = [(model, points) for model, points in curves if points]
    if not curves:
        return None
    unit, y_axis = curve.unit, curve.y_axis
    if curve is PEAK_MEMORY:
        unit = "GiB"
        y_axis = charts.axis([y for _, points in curves for _, y in points], zero=True, room=0.04)
    series = [Series(model.slot, model.label, points) for model, points in curves]
    svg = charts.lines(series, f"{curve.title} over training steps", "training step", unit, y=y_axis)
    with_log = [model for model in models if model.metrics]  # `training_notes` is about the others
    return Figure(curve.title, curve.note, svg, _absent_models(with_log, [model for model, _ in curves]))


def training_notes(models: Sequence[Model]) -> list[str]:
    """Sentences on what the curves do not show, and why."""
    reasons: dict[str, list[str]] = {}
    for model in models:
        if not model.metrics:
            reasons.setdefault(_no_curves(model), []).append(model.label)
    notes = [f"No curves for {join_words(labels)}: {reason}." for reason, labels in reasons.items()]
    if not any(_points(model.metrics, curve.value) for model in models for curve in SAMPLE_CURVES):
        notes.append("These runs did not evaluate a sample while they trained, so there are no curves of answers.")
    return notes


def _no_curves(model: Model) -> str:
    """Why a model has no curves of training."""
    if not model.run:
        return "no run folder was given"
    if text(model.run, "command") == "memorize":
        return "it was trained by memorizing, not by unlearning"
    return "the run folder has no log of its steps"


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
    curves = []
    for model in models:
        rates = (numbers(model.scores, "membership", "roc", name) for name in ("fpr", "tpr"))
        points = list(zip(*rates, strict=False))
        if points:
            curves.append((model, points))
    if not curves:
        return None
    svg = charts.lines(
        [Series(model.slot, model.label, points) for model, points in curves],
        "ROC curve of the loss attack, true against false positive rate",
        "false positive rate (unseen documents)",
        "true positive rate (forgotten documents)",
        x=UNIT_AXIS,
        y=UNIT_AXIS,
        square=True,
        guides=[(0.0, 0.0, 1.0, 1.0)],
    )
    note = "ROC curve; on the diagonal, documents cannot be told apart"
    return Figure("The loss attack", note, svg, _absent_models(models, [model for model, _ in curves]))


def letter_figure(models: Sequence[Model]) -> Figure | None:
    """The letters with which the models answer MMLU; a model that always answers A knows nothing."""
    groups = []
    for letter in "ABCD":
        shares = [(model, number(model.scores, "mmlu", "letters", letter)) for model in models]
        groups.append((letter, [Dot(model.slot, model.label, share) for model, share in shares if share is not None]))
    if not any(group for _, group in groups):
        return None
    svg = charts.bars(groups, "Share of MMLU answers by letter", "letter", "share of the model's answers")
    drawn = [model for model in models if number(model.scores, "mmlu", "letters", "A") is not None]
    note = "the correct answers are spread almost evenly"
    return Figure("Answers by letter", note, svg, _absent_models(models, drawn))


def attack_figures(models: Sequence[Model]) -> list[Figure]:
    """What attacks recover of the forget set: answers of questions, and texts."""
    kinds = (("knowledge", "questions"), ("regurgitation", "texts"))
    figures = [_attack_figure(models, attack, kind, noun) for attack in ATTACKS.values() for kind, noun in kinds]
    return [figure for figure in (*figures, _relearned_loss_figure(models)) if figure]


def _relearned_loss_figure(models: Sequence[Model]) -> Figure | None:
    """The loss of the forget answers that relearning does not train on."""
    curves = [(model, relearned_losses(model.scores)) for model in models]
    curves = [(model, points) for model, points in curves if points]
    if not curves:
        return None
    attack = ATTACKS["relearn"]
    svg = charts.lines(
        [Series(model.slot, model.label, points) for model, points in curves],
        f"{attack.title}, loss of the other forget answers",
        attack.x_label,
        "nats a token",
        x=charts.axis([x for _, points in curves for x, _ in points], zero=True),
        y=charts.axis([y for _, points in curves for _, y in points], zero=True),
    )
    note = "loss of the other forget answers; a fall shows what was hidden before it is said"
    return Figure(attack.title, note, svg, _absent_models(models, [model for model, _ in curves]))


def _attack_figure(models: Sequence[Model], attack: Attack, kind: str, noun: str) -> Figure | None:
    curves = [(model, _attack_points(model, attack, kind)) for model in models]
    curves = [(model, points) for model, points in curves if points]
    if not curves:
        return None

    # Categories get one tick each, at equal distance, and fewer bits are further right.
    values: list[float] = sorted({x for _, points in curves for x, _ in points}, reverse=attack.x_key == "bits")
    if attack.x_is_category:
        ticks = CATEGORY_NAMES.get(attack.name, {})
        x_axis = charts.named([ticks.get(value, f"{value:g}") for value in values])
        curves = [(model, [(float(values.index(x)), y) for x, y in points]) for model, points in curves]
    else:
        x_axis = charts.axis(values, zero=True)

    series = [Series(model.slot, model.label, points) for model, points in curves]
    x_label = CATEGORY_AXES.get(attack.name, attack.x_label)
    y_label = LEAKS_AXIS if attack.leaks else QUESTIONS_AXIS if kind == "knowledge" else TEXTS_AXIS
    svg = charts.lines(
        series, f"{attack.title}, forget set, {noun}: {y_label}", x_label, y_label, x=x_axis, y=UNIT_AXIS
    )
    return Figure(attack.title, f"forget set, {noun}", svg, _absent_models(models, [model for model, _ in curves]))


def _attack_points(model: Model, attack: Attack, kind: str) -> Points:
    points = []
    for point in objects(mapping(model.scores, "attacks"), attack.name):
        unicode = number(point, f"unicode_{kind}")  # older scores lack it
        score = number(point, kind) if unicode is None else unicode
        x, y = number(point, attack.x_key), number(point, f"{kind}_leak") if attack.leaks else score
        if x is not None and y is not None:
            points.append((x, y))
    return sorted(points, reverse=attack.x_key == "bits")
