"""Put the page together and write it: one file, nothing loaded from anywhere, every text in it escaped.

What a model said is hostile until proven otherwise. Jinja escapes what stands in the markup; the examples travel as
JSON that no `</script>` can end and reach the page as text nodes alone; and the page's own policy lets it run the one
script and the one style sheet that it came with, by their hashes, and fetch nothing.
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
from neko_lean.report import charts, figures, making, tables
from neko_lean.report.figures import Model
from neko_lean.report.judge import RULES, Judgement, judge
from neko_lean.report.read import Collected, Scored, collect
from neko_lean.report.values import number, text

HERE = Path(__file__).parent


TITLE = "Did it forget?"


@dataclass(frozen=True)
class Verdict:
    """A model and what is to be said of it."""

    model: Model
    judgement: Judgement


def report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    before: str | Path | None = None,
    title: str = TITLE,
    texts: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one HTML page about scored models and the runs that made them.

    Args:
        runs: score folders, folders of `unlearn`, `SCORES=RUN` where no name tells which belong together, or folders
            that hold such, as `neko-lean demo` writes.
        out: the HTML file; appears only when it is complete.
        before: the score folder of the model before; by default the one whose model the runs started from.
        title: the page's heading.
        texts: whether the rows and what the models said about them are shown; the rest holds no text of theirs but
            what the scores' own verdict may cite.

    Returns where it is and its size in bytes, the names of the models, before first, how many rows it shows, and the
    word for each.
    """
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
        "models": [one.label for one in collected.all],
        "rows": len(examples),
        "words": {one.model.label: one.judgement.word for one in verdicts},
    }


def render(collected: Collected, verdicts: Sequence[Verdict], examples: Sequence[dict[str, Any]], title: str) -> str:
    """The page as text."""
    models = _models(collected)
    style, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    missed, missed_too = tables.missed(models)
    areas, by_task, rates = tables.attacks(models)
    mmlu, subjects = tables.mmlu(models)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = {
        "models": [{"slot": one.slot, "label": one.label} for one in models],
        "rows": list(examples),
    }
    return environment.get_template("page.html").render(
        title=title,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        models=models,
        key=charts.key,
        legend=charts.legend([(one.slot, one.label) for one in models]),
        runs=charts.legend([(one.slot, one.label) for one in models if one.metrics]),
        verdicts=verdicts,
        points=figures.POINTS,
        rules=RULES,
        subtitle=_subtitle(models),
        headline=tables.headline(models),
        cell_figures=figures.cell_figures(models),
        cells=tables.cells(models),
        missed=missed,
        missed_too=missed_too,
        training=figures.training_figures(models),
        roc=figures.roc_figure(models),
        areas=areas,
        membership_more=[one for one in (by_task, rates) if one],
        mmlu=mmlu,
        subjects=subjects,
        letters=figures.letter_figure(models),
        attack_figures=figures.attack_figures(models),
        examples=len(examples),
        data=htmlsafe_json_dumps(data, ensure_ascii=False, separators=(",", ":")),
        made=making.made_with(models),
        version=neko_lean.__version__,
    )


def _hash(source: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _model(one: Scored, slot: int) -> Model:
    run = one.run
    # The curves of the model before are of how it learned, another story.
    metrics = run.metrics if run and run.unlearned else []
    return Model(slot, one.label, one.scores, run.about if run else {}, metrics)


def _models(collected: Collected) -> list[Model]:
    before = [_model(collected.before, 0)] if collected.before else []
    return [*before, *(_model(one, charts.slot(n)) for n, one in enumerate(collected.after))]


def _verdicts(collected: Collected) -> list[Verdict]:
    start = collected.before.scores if collected.before else None
    return [Verdict(_model(one, charts.slot(n)), judge(one.scores, start)) for n, one in enumerate(collected.after)]


def _subtitle(models: Sequence[Model]) -> str:
    counts = [
        f"{n:.0f} {split} rows" for split in ("forget", "retain") if (n := number(models[0].scores, "rows", split))
    ]
    name = text(models[0].scores, "model") if models[0].slot == 0 else ""
    others = ", ".join(one.label for one in models if one.slot)
    return ". ".join(
        part for part in (f"{name}, before and after {others}" if name else others, ", ".join(counts)) if part
    )


def _examples(collected: Collected) -> list[dict[str, Any]]:
    """One object a row, in the order of the first scores that have it, with what each model said, None where it was
    not asked."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for place, scored in enumerate(collected.all):
        for row in scored.rows:
            key = (text(row, "split"), text(row, "id"))
            if key not in found:
                found[key] = {
                    "split": key[0],
                    "id": key[1],
                    "task": text(row, "task"),
                    "kind": text(row, "kind"),
                    "input": text(row, "input"),
                    "output": text(row, "output"),
                    "said": [None] * len(collected.all),
                }
            seen = number(row, "unicode_score")  # in any script; older scores have none
            score = number(row, "score") if seen is None else seen
            found[key]["said"][place] = [text(row, "generation"), score, text(row, "ended")]
    return list(found.values())
