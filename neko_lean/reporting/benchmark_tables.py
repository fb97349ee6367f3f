"""The report's tables on unlearning benchmarks, membership inference and MMLU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from neko_lean.reporting.figures import Model
from neko_lean.reporting.table import SMALL_PRINT, Cell, Group, Table, auc_cell, make_line, make_table, number_column
from neko_lean.reporting.values import NOT_MEASURED, mapping
from neko_lean.scoring import MEMBERSHIP_ATTACKS, number
from neko_lean.scoring.benchmarks.lines import BENCHMARK_LINES, benchmark_title, format_metric


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
