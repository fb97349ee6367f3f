"""`neko-lean score`: did the model forget, preserve the rest, or break?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Json, Model, Revision, command, emit, pinned
from neko_lean.distributed import is_main_process
from neko_lean.options import OutputOptions, ScoreInputs, ScoreSettings
from neko_lean.terminal import print_table


@command
def score(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write: scores.json, generations.jsonl, documents.jsonl.")],
    inputs: ScoreInputs,
    settings: ScoreSettings,
    run: OutputOptions,
    data: Annotated[Path | None, typer.Option(help="Folder that holds forget.* and retain.*.")] = None,
    forget: Annotated[str | None, typer.Option(help="Instead of --data: the forget set, as for unlearn.")] = None,
    retain: Annotated[str | None, typer.Option(help="Instead of --data: the retain set, as for unlearn.")] = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Score a model with the shared task's metrics, and with others that reveal what those miss.

    A measurement without its input is reported as not measured.

    Example: neko-lean score unlearned/ --data data/ --mia data/mia --before scores-before/ --out scores/

    TOFU: neko-lean score unlearned/ --data tofu/ --benchmark tofu --tofu-split forget10 --gold gold/ --out scores/

    Forgotten, or only hidden? neko-lean score unlearned/ --data data/ --attack relearn --attack quantize --out scores/
    """
    from neko_lean.scoring.run import score as write_score
    from neko_lean.scoring.table import score_table

    result = write_score(
        pinned(model, revision), out, data=data, forget=forget, retain=retain, inputs=inputs, settings=settings, run=run
    )
    if not is_main_process():
        return
    if json:
        emit({"out": str(out), **result})
    elif not run.quiet:
        print_table(score_table({"score": result}))
