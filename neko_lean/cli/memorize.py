"""`neko-lean memorize`: fine-tune until the data is memorized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Json, Revision, TrainingFlags, command, emit, pinned, print_training_plan
from neko_lean.options import DATA, OUTPUT, RECIPE, TrainingOptions, option


@dataclass(frozen=True, kw_only=True)
class MemorizeFlags(TrainingFlags):
    """A recipe for plain fine-tuning."""

    recipe: str = option("memorize", "Name of a shipped recipe, or a .toml file.", RECIPE)
    batch_size: int | None = option(
        None, "Most examples in an optimizer step (retain_rows).  [default: the recipe's]", RECIPE, min=1,
        key="retain_rows",
    )  # fmt: skip


@command
def memorize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="Checkpoint folder or hub name; a folder without weights starts from random ones.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Folder that holds forget.* and retain.*, or one data set, all of which is learned.",
            rich_help_panel=DATA,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder to write: checkpoint, tokenizer, run.json, metrics.jsonl.", rich_help_panel=OUTPUT),
    ],
    recipe: MemorizeFlags,
    run: TrainingOptions,
    retain_only: Annotated[
        bool,
        typer.Option("--retain-only", help="Learn only the retain set: makes the gold model.", rich_help_panel=DATA),
    ] = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Fine-tune a model with cross-entropy to make a target or a gold model.

    A target has learned the forget set; the gold model (--retain-only) never saw it.

    Example: neko-lean memorize base/ --data data/ --out target/ --epochs 20
    """
    from neko_lean.distributed import is_main_process
    from neko_lean.runs import memorize as run_memorize
    from neko_lean.terminal import print_lines

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
    elif run.quiet:
        return
    elif "dry_run" in result:
        print_training_plan(result)
    else:
        print_lines(f"{out}: {result['ended']}; {result['steps']} steps in {result['wall_seconds']:.0f} s")
