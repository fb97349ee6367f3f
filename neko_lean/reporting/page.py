"""Write the report: one HTML file that loads nothing, with every text in it escaped.

Generated text is treated as hostile. Jinja escapes all markup; the examples are JSON that cannot contain `</script>`,
and are inserted as text nodes only; and the page's Content-Security-Policy only allows its own script and style sheet,
by their hashes, and no network access.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

import neko_lean
from neko_lean.outputs import claim_file, publish_file
from neko_lean.reporting import benchmark_tables, charts, figures, tables
from neko_lean.reporting.collect import Collected, collect
from neko_lean.reporting.figures import Model
from neko_lean.reporting.judge import RULES, Judgement, judge_model
from neko_lean.reporting.provenance import provenance_tables
from neko_lean.reporting.read import Scored
from neko_lean.reporting.values import text
from neko_lean.scoring import number

HERE = Path(__file__).parent
TITLE = "Did it forget?"


@dataclass(frozen=True)
class Verdict:
    """A model and its judgement."""

    model: Model
    judgement: Judgement


def report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    before: str | Path | None = None,
    title: str = TITLE,
    texts: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an HTML page about scored models and the runs that trained them.

    Args:
        runs: one or several score folders, run folders of `unlearn`, or folders that hold them, as `neko-lean demo`
            writes; or SCORES=RUN for a pair that cannot be matched by name.
        out: the HTML file; it only appears once it is complete.
        before: score folder of the model before unlearning; by default that of the model that the runs started from.
        title: the page's heading.
        texts: whether to show the rows and generations. Without them, the page holds no text of the data except what
            the verdicts quote.
        overwrite: replace a file that neko-lean wrote.

    Returns:
        `out`, its size in `bytes`, the label of the model `before`, the labels of all `models`, the number of `rows`
        shown, and the phrase for each model in `words`.

    Raises:
        NekoLeanError: the folders cannot be read or matched, or the file must not be written.
    """
    runs = [runs] if isinstance(runs, (str, Path)) else list(runs)
    output = claim_file(out, "--out", [*runs, before], overwrite=overwrite)
    collected = collect(runs, before)
    examples = _examples(collected) if texts else []
    verdicts = _verdicts(collected)
    page = render(collected, verdicts, examples, title).encode("utf-8", "replace")
    publish_file(page, output, "--out")
    return {
        "out": str(output.path),
        "bytes": len(page),
        "before": collected.before.label if collected.before else None,
        "models": [scored.label for scored in collected.all],
        "rows": len(examples),
        "words": {verdict.model.label: verdict.judgement.phrase for verdict in verdicts},
    }


def render(collected: Collected, verdicts: Sequence[Verdict], examples: Sequence[dict[str, Any]], title: str) -> str:
    """The page as text."""
    models = _models(collected)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = {"models": [{"slot": model.slot, "label": model.label} for model in models], "rows": list(examples)}
    return environment.get_template("page.html").render(
        title=title,
        subtitle=_subtitle(models),
        version=neko_lean.__version__,
        models=models,
        verdicts=verdicts,
        rules=RULES,
        points=figures.MAX_POINTS,
        examples=len(examples),
        data=htmlsafe_json_dumps(data, ensure_ascii=False, separators=(",", ":")),
        **_style_and_script(),
        **_tables(models),
        **_figures(models),
    )


def _style_and_script() -> dict[str, Any]:
    """The page's style sheet and script, and the policy that allows nothing else."""
    style, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return {"style": Markup(style), "script": Markup(script), "policy": policy}


def _hash(source: str) -> str:
    """The hash of an inline script or style for a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _tables(models: Sequence[Model]) -> dict[str, Any]:
    missed, missed_too = tables.missed(models)
    areas, by_task, rates = benchmark_tables.membership_tables(models)
    mmlu, subjects = benchmark_tables.mmlu_tables(models)
    return {
        "headline": tables.headline(models),
        "benchmark": benchmark_tables.unlearning_table(models),
        "cells": tables.cells(models),
        "by_group": tables.by_group(models),
        "missed": missed,
        "missed_too": missed_too,
        "areas": areas,
        "membership_more": [table for table in (by_task, rates) if table],
        "mmlu": mmlu,
        "subjects": subjects,
        "made": provenance_tables(models),
    }


def _figures(models: Sequence[Model]) -> dict[str, Any]:
    return {
        "key": charts.key,
        "legend": charts.legend([(model.slot, model.label) for model in models]),
        "runs": charts.legend([(model.slot, model.label) for model in models if model.metrics]),
        "cell_figures": figures.cell_figures(models),
        "training": figures.training_figures(models),
        "roc": figures.roc_figure(models),
        "letters": figures.letter_figure(models),
        "attack_figures": figures.attack_figures(models),
    }


def _model(scored: Scored, slot: int) -> Model:
    run = scored.run
    # The model before has curves of how it learned, which are not part of the report.
    metrics = run.metrics if run and run.is_unlearning else []
    return Model(slot, scored.label, scored.scores, run.about if run else {}, metrics)


def _models(collected: Collected) -> list[Model]:
    before = [_model(collected.before, 0)] if collected.before else []
    return [*before, *(_model(scored, charts.slot(n)) for n, scored in enumerate(collected.after))]


def _verdicts(collected: Collected) -> list[Verdict]:
    before = collected.before.scores if collected.before else None
    return [
        Verdict(_model(scored, charts.slot(n)), judge_model(scored.scores, before))
        for n, scored in enumerate(collected.after)
    ]


def _subtitle(models: Sequence[Model]) -> str:
    """The names of the models, and the numbers of rows."""
    counts = [
        f"{count:.0f} {split} rows"
        for split in ("forget", "retain")
        if (count := number(models[0].scores, "rows", split))
    ]
    name = text(models[0].scores, "model") if models[0].slot == 0 else ""
    labels = ", ".join(model.label for model in models if model.slot)
    parts = (f"{name}, before and after {labels}" if name else labels, ", ".join(counts))
    return ". ".join(part for part in parts if part)


def _examples(collected: Collected) -> list[dict[str, Any]]:
    """The rows with every model's generation, None for a model that was not scored on the row."""
    examples: dict[tuple[str, str], dict[str, Any]] = {}
    for index, scored in enumerate(collected.all):
        for row in scored.rows:
            key = (text(row, "split"), text(row, "id"))
            if key not in examples:
                examples[key] = {
                    "split": key[0],
                    "id": key[1],
                    "task": text(row, "task"),
                    "kind": text(row, "kind"),
                    "input": text(row, "input"),
                    "output": text(row, "output"),
                    "said": [None] * len(collected.all),
                }
            unicode = number(row, "unicode_score")  # older scores lack it
            score = number(row, "score") if unicode is None else unicode
            examples[key]["said"][index] = [text(row, "generation"), score, text(row, "ended")]
    return list(examples.values())
