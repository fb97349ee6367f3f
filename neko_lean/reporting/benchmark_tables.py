"""The report's tables on unlearning benchmarks, membership inference, MMLU and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from neko_lean.reporting.figures import Model
from neko_lean.reporting.table import (
    SMALL_PRINT,
    Cell,
    Group,
    Line,
    Table,
    auc_cell,
    make_line,
    make_table,
    number_column,
)
from neko_lean.reporting.values import NOT_MEASURED, format_interval, format_number, mapping, objects
from neko_lean.scoring import MEMBERSHIP_ATTACKS, interval, number
from neko_lean.scoring.benchmarks.lines import BENCHMARK_LINES, benchmark_title, format_metric
from neko_lean.scoring.names import cell_content


def unlearning_table(models: Sequence[Model]) -> Table | None:
    """The metrics of TOFU and MUSE; None if no model was scored on them."""
    titles = list(dict.fromkeys(title for model in models if (title := benchmark_title(model.scores))))
    groups = [
        Group(
            title,
            [
                make_line(models, label, note, partial(_metric_cell, title=title, key=key))
                for key, label, note in BENCHMARK_LINES[title.split()[0]]
            ],
        )
        for title in titles
    ]
    return make_table("Unlearning benchmarks", "As OpenUnlearning defines them.", groups)


def _metric_cell(model: Model, title: str, key: str) -> Cell:
    value = number(model.scores, "benchmark", *key.split("."))
    if value is None or benchmark_title(model.scores) != title:
        return Cell(NOT_MEASURED, missing=True)
    return Cell(format_metric(key, value).replace("-", "−"))  # noqa: RUF001 (the minus sign is intended)


def membership_tables(models: Sequence[Model]) -> tuple[Table | None, Table | None, Table | None]:
    """AUC of every membership attack over all documents; AUC by task; and the rates at a low false positive rate."""
    blocks = list(dict.fromkeys(block for model in models for block in mapping(model.scores, "membership", "attacks")))
    areas, rates = [], []
    for block in sorted(blocks, key=lambda block: block != "all"):
        title = "All documents" if block == "all" else f"Documents of {block}"
        area_lines, rate_lines = [], []
        for attack in MEMBERSHIP_ATTACKS.values():
            path = ("membership", "attacks", block, attack.name)
            area_lines.append(make_line(models, attack.label, attack.description, partial(_auc_at, path=path)))
            for side in ("low", "high"):
                column = number_column(*path, f"tpr_members_{side}")
                rate_lines.append(make_line(models, f"{attack.label}, members score {side}", "", column))
        areas.append(Group(title, area_lines))
        rates.append(Group(title, rate_lines))

    if not blocks:  # older scores only have the loss attack
        loss = MEMBERSHIP_ATTACKS["loss"]
        line = make_line(models, loss.label, loss.description, partial(_auc_at, path=("membership",)))
        areas = [Group("All documents", [line])]

    caption = "Small print: 95 % interval, and two-sided AUC."
    rate_caption = "Share of forgotten documents found with a false positive rate of at most 1 %."
    return (
        make_table("AUC of each attack", caption, areas[:1]),
        make_table("By task", caption, areas[1:]),
        make_table("True positives at a low false positive rate", rate_caption, rates),
    )


def _auc_at(model: Model, path: tuple[str, ...]) -> Cell:
    return auc_cell(model, *path)


def mmlu_tables(models: Sequence[Model]) -> tuple[Table | None, Table | None]:
    """MMLU's accuracy next to that of constant answers; and accuracy by subject."""
    if all(number(model.scores, "mmlu", "micro") is None for model in models):
        return None, None
    accuracy = [
        make_line(models, name, note, number_column("mmlu", key))
        for key, name, note in (
            ("micro", "accuracy", "mean over questions"),
            ("macro", "accuracy, mean over subjects", ""),
            ("questions", "questions", ""),
            ("shots", "examples", "before each question, at most"),
        )
    ]
    floors = [make_line(models, f"always {letter}", "", number_column("mmlu", "floors", letter)) for letter in "ABCD"]
    subjects = sorted({name for model in models for name in mapping(model.scores, "mmlu", "subjects")})
    by_subject = [
        make_line(models, name.replace("_", " "), "", number_column("mmlu", "subjects", name, "accuracy"))
        for name in subjects
    ]
    groups = [Group("The model", accuracy), Group("Floors: accuracy of a constant answer", floors)]
    return make_table("MMLU", SMALL_PRINT, groups), make_table("By subject", "Accuracy.", [Group("", by_subject)])


def sampling_table(models: Sequence[Model]) -> Table | None:
    """The share of forget rows that leak when decoding greedily and in k samples, over all rows and by cell."""
    points = [point for model in models for point in objects(model.scores, "attacks", "sample")]
    counts = sorted({count for point in points if (count := number(point, "samples")) is not None})
    cells = dict.fromkeys(cell for point in points for cell in mapping(point, "cells"))

    def lines(value: tuple[str, ...], ends: tuple[str, ...]) -> list[Line]:
        names = {count: f"leak@{count:g}" if count else "greedy" for count in counts}
        return [
            make_line(models, name, "", partial(_leak_cell, count=count, value=value, ends=ends))
            for count, name in names.items()
        ]

    groups = [Group("Forget set: all rows", lines(("leak",), ("leak_interval",)))]
    for cell in cells:
        path = ("cells", cell)
        groups.append(Group(f"Forget set: {cell_content(cell)}", lines((*path, "value"), (*path, "interval"))))
    caption = "Share of forget rows of which at least one of k samples leaks. Small print: 95 % interval."
    return make_table("Leaks when sampling", caption, groups)


def _leak_cell(model: Model, count: float, value: tuple[str, ...], ends: tuple[str, ...]) -> Cell:
    for point in objects(model.scores, "attacks", "sample"):
        share = number(point, *value)
        if number(point, "samples") == count and share is not None:
            small = format_interval(interval(point, *ends))
            return Cell(format_number(share), [small] if small else [])
    return Cell(NOT_MEASURED, missing=True)
