"""Write the report: one HTML file that loads nothing, with every text in it escaped.

Generated text is treated as hostile. Jinja escapes all markup; the examples are JSON that cannot contain `</script>`,
and are inserted as text nodes only; and the page's Content-Security-Policy only allows its own script and style sheet,
by their hashes, and no network access.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
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
from neko_lean.reporting.examples import example_rows, first_rows
from neko_lean.reporting.figures import Model
from neko_lean.reporting.judge import RULES, Judgement, judge_model
from neko_lean.reporting.provenance import provenance_tables
from neko_lean.reporting.read import Scored
from neko_lean.reporting.values import text
from neko_lean.scoring import SPLITS, number

HERE = Path(__file__).parent
TITLE = "Did it forget?"
# Ids and headings, in the order of the page.
SECTIONS = {
    "examples": "Examples",
    "numbers": "Headline numbers",
    "cells": "Forgetting and retention",
    "missed": "What exact match misses",
    "training": "Training",
    "membership": "Membership",
    "mmlu": "MMLU",
    "attacks": "Attacks",
    "made": "How it was made",
}
ABSENT = {
    "examples": "No examples: the page was written without texts, or the scores have none.",
    "missed": "Leaked and memorised answers were not measured.",
    "training": "No curves of training: no unlearning run of these models was given.",
    "membership": "Membership was not measured.",
    "mmlu": "MMLU was not measured.",
    "attacks": "No attacks were run.",
}


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

    Example::

        neko_lean.report(["scores-before/", "scores/", "unlearned/"], "report.html")
    """
    runs = [runs] if isinstance(runs, (str, Path)) else list(runs)
    output = claim_file(out, "--out", [*runs, before], overwrite=overwrite)
    collected = collect(runs, before)
    examples = example_rows(collected) if texts else []
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
    content = {**_tables(models), **_figures(models)}
    sections = _sections(content, examples)
    return environment.get_template("page.html").render(
        title=title,
        asked=_asked(models),
        descriptions=[(model, _description(model)) for model in models],
        version=neko_lean.__version__,
        models=models,
        verdicts=verdicts,
        rules=RULES,
        points=figures.MAX_POINTS,
        sections=sections,
        absent=_absent(sections),
        first_rows=first_rows(examples),
        num_examples=len(examples),
        data=htmlsafe_json_dumps(data, ensure_ascii=False, separators=(",", ":")),
        **_style_and_script(len(models)),
        **content,
    )


def _sections(content: Mapping[str, Any], examples: Sequence[Any]) -> dict[str, str]:
    """The sections below the verdict that have content: their ids and headings, in the order of the page."""
    filled = {
        "examples": bool(examples),
        "numbers": content["headline"] or content["benchmark"],
        "cells": content["cells"],
        "missed": content["missed"],
        "training": content["training"],
        "membership": content["areas"],
        "mmlu": content["mmlu"],
        "attacks": content["attack_figures"],
        "made": True,
    }
    return {name: SECTIONS[name] for name, value in filled.items() if value}


def _absent(sections: Mapping[str, str]) -> list[str]:
    """Sentences on the sections that the page does not have, and why."""
    return [sentence for name, sentence in ABSENT.items() if name not in sections]


def _style_and_script(num_models: int) -> dict[str, Any]:
    """The page's style sheet and script, and the policy that allows nothing else."""
    style, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    style += f":root {{ --models: {num_models}; }}\n"  # the columns of a table on a narrow screen
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
        "script_note": tables.script_note(models),
        "by_group": tables.by_group(models),
        "missed": missed,
        "missed_too": missed_too,
        "areas": areas,
        "membership_more": [table for table in (by_task, rates) if table],
        "mmlu": mmlu,
        "subjects": subjects,
        "sampling": benchmark_tables.sampling_table(models),
        "made": provenance_tables(models),
    }


def _figures(models: Sequence[Model]) -> dict[str, Any]:
    return {
        "key": charts.key,
        "legend": charts.legend([(model.slot, model.label) for model in models]),
        "runs": charts.legend([(model.slot, model.label) for model in models if model.metrics]),
        "cell_figures": figures.cell_figures(models),
        "training": figures.training_figures(models),
        "training_notes": figures.training_notes(models),
        "interval_note": figures.interval_note(models),
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


def _asked(models: Sequence[Model]) -> str:
    """What the models were to forget and to keep, with the numbers of rows that were scored."""
    forget, retain = (number(models[0].scores, "rows", split) for split in SPLITS)
    name = (text(models[0].scores, "model") if models[0].slot == 0 else "") or "the model"
    forget_set = "the forget set" + (f" ({forget:,.0f} rows)" if forget else "")
    checked = f", which is checked on the retain set ({retain:,.0f} rows)" if retain else ""
    return f"Make {name} forget {forget_set}, and answer everything else as before{checked}."


def _description(model: Model) -> str:
    """How a model was made, in one or two sentences."""
    if model.slot == 0:
        return "the model before unlearning."
    if text(model.run, "command") == "memorize":
        return "trained by memorizing, for comparison."
    summary, steps = text(model.run, "recipe", "summary").rstrip("."), number(model.run, "steps")
    if not model.run:
        return "no run folder was given, so the page cannot tell how it was made."
    return ". ".join(part for part in (summary, f"{steps:,.0f} steps" if steps else "") if part) + "."
