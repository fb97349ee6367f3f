"""`neko-lean score`: did the model forget, preserve the rest, or break?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from neko_lean.cli.common import Json, Model, Revision, command, emit, pinned, planned_output
from neko_lean.options import DATA, OUTPUT, OutputOptions, ScoreInputs, ScoreSettings


@command
def score(
    model: Model,
    *,
    data: Annotated[
        Path | None, typer.Option(help="Folder that holds forget.* and retain.*.", rich_help_panel=DATA)
    ] = None,
    forget: Annotated[
        str | None, typer.Option(help="Instead of --data: the forget set, as for unlearn.", rich_help_panel=DATA)
    ] = None,
    retain: Annotated[
        str | None, typer.Option(help="Instead of --data: the retain set, as for unlearn.", rich_help_panel=DATA)
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="Folder to write: scores.json, generations.jsonl, documents.jsonl.", rich_help_panel=OUTPUT),
    ],
    inputs: ScoreInputs,
    settings: ScoreSettings,
    run: OutputOptions,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Score a model with the shared task's metrics, and with others that reveal what those miss.

    A measurement without its input is reported as not measured.

    Example: neko-lean score unlearned/ --data data/ --mia data/mia --before scores-before/ --out scores/

    TOFU: neko-lean score unlearned/ --data tofu/ --benchmark tofu --tofu-split forget10 --gold gold/ --out scores/

    Forgotten, or only hidden? neko-lean score unlearned/ --data data/ --attack relearn --attack quantize --out scores/
    """
    from neko_lean.distributed import is_main_process
    from neko_lean.scoring.run import score as write_score
    from neko_lean.scoring.table import score_table
    from neko_lean.terminal import print_lines, print_table

    result = write_score(
        pinned(model, revision), out, data=data, forget=forget, retain=retain, inputs=inputs, settings=settings, run=run
    )
    if not is_main_process():
        return
    if json:
        emit({"out": str(out), **result})
    elif run.quiet:
        return
    elif "dry_run" in result:
        print_lines(*_planned(result))
    else:
        print_table(score_table({"score": result}))


def _planned(result: dict[str, Any]) -> list[str]:
    """What a dry run says."""
    documents = sum(result["documents"].values())
    extras = [*(f"--attack {name}" for name in result["attacks"]), *(f"--lm-eval {task}" for task in result["lm_eval"])]
    return [
        *planned_output(result),
        f"  rows: {result['rows']['forget']} forget, {result['rows']['retain']} retain; {documents} documents, "
        f"{result['mmlu_subjects']} MMLU subjects",
        *([f"  also: {', '.join(extras)}"] if extras else []),
        f"  at most {result['max_new_tokens']} new tokens per generation, in {result['dtype']} on {result['device']}",
    ]
