"""`neko-lean memorize`: fine-tune until the data is memorized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Json, Revision, TrainingFlags, command, emit, pinned
from neko_lean.distributed import is_main_process
from neko_lean.options import TrainingOptions, option
from neko_lean.terminal import print_lines


@dataclass(frozen=True, kw_only=True)
class MemorizeFlags(TrainingFlags):
    """A recipe for plain fine-tuning."""

    recipe: str = option("memorize", "Name of a shipped recipe, or a .toml file.")


@command
def memorize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="Checkpoint folder or hub name; a folder without weights starts from random ones.",
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder that holds forget.* and retain.*.")],
    out: Annotated[Path, typer.Option(help="Folder to write: checkpoint, tokenizer, run.json, metrics.jsonl.")],
    recipe: MemorizeFlags,
    run: TrainingOptions,
    retain_only: Annotated[
        bool, typer.Option("--retain-only", help="Learn only the retain set: makes the gold model.")
    ] = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Fine-tune a model with cross-entropy: makes a target to unlearn from, or a retain-only gold model.

    Example: neko-lean memorize base/ --data data/ --out target/ --set epochs=20
    """
    from neko_lean.runs import memorize as run_memorize

    result = run_memorize(
        pinned(model, revision),
        out,
        data=data,
        recipe=recipe.recipe,
        overrides=recipe.overrides(),
        sets=("retain",) if retain_only else ("forget", "retain"),
        run=run,
    )
    if not is_main_process():
        return
    if json:
        emit({"out": str(out), **result})
    elif not run.quiet:
        print_lines(f"{out}: {result['ended']}; {result['steps']} steps in {result['wall_seconds']:.0f} s")
