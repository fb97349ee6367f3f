"""`neko-lean memorize`: fine-tune until the data is known by heart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import (
    Device,
    Json,
    MaxSteps,
    Overwrite,
    Quiet,
    Resume,
    Revision,
    SaveEvery,
    Seed,
    Set,
    Split,
    command,
    emit,
    overrides,
    pinned,
)
from neko_lean.distributed import is_main_process
from neko_lean.terminal import print_lines


@command
def memorize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="Checkpoint folder or hub name; a folder with config.json and tokenizer alone starts at random.",
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder holding forget.* and retain.*.")],
    out: Annotated[Path, typer.Option(help="Folder to write: checkpoint, tokenizer, run.json, metrics.jsonl.")],
    retain_only: Annotated[bool, typer.Option("--retain-only", help="Learn retain.* alone: the gold model.")] = False,
    split: Split = None,
    recipe: Annotated[str, typer.Option(help="Name of a shipped recipe, or a .toml file.")] = "memorize",
    set_: Set = None,
    max_steps: MaxSteps = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = None,
    save_every: SaveEvery = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on the rows with cross-entropy: makes a target to unlearn from, or a retain-only gold model.

    Example: neko-lean memorize base/ --data data/ --out target/ --set epochs=20
    """
    from neko_lean.runs import memorize as run

    result = run(
        pinned(model, revision),
        data,
        out,
        recipe=recipe,
        overrides=overrides(set_, max_steps=max_steps),
        sets=("retain",) if retain_only else ("forget", "retain"),
        split=split,
        seed=seed,
        device=device,
        save_every=save_every,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )
    if not is_main_process():
        return
    if json:
        emit({"out": str(out), **result})
    elif not quiet:
        print_lines(f"{out}: {result['ended']}; {result['steps']} steps in {result['wall_seconds']:.0f} s")
