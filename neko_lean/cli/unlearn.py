"""`neko-lean unlearn`: forget, with the student as the only model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import (
    Device,
    Json,
    MaxSteps,
    Model,
    Overwrite,
    Quiet,
    Seed,
    Set,
    command,
    emit,
    gibibytes,
    overrides,
)


@command
def unlearn(
    model: Model,
    forget: Annotated[Path, typer.Option(help="Rows to forget: a file, or a folder holding forget.*.")],
    retain: Annotated[Path, typer.Option(help="Rows to hold still: a file, or a folder holding retain.*.")],
    cache: Annotated[Path, typer.Option(help="What cache-teacher wrote for this model and these retain rows.")],
    out: Annotated[Path, typer.Option(help="Folder to write: checkpoint, tokenizer, run.json, metrics.jsonl.")],
    recipe: Annotated[str, typer.Option(help="Name of a shipped recipe, or a .toml file.")] = "neko",
    set_: Set = None,
    max_steps: MaxSteps = None,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push the forget set out of the model and hold the retain set still. Never loads the teacher.

    Example: neko-lean unlearn allenai/OLMo-1B-0724-hf --forget data/ --retain data/ --cache cache/ --out unlearned/
    """
    from neko_lean.runs import unlearn as run

    result = run(
        model,
        out,
        forget,
        retain,
        cache=cache,
        recipe=recipe,
        overrides=overrides(set_, max_steps),
        seed=seed,
        device=device,
        overwrite=overwrite,
        quiet=quiet,
    )
    if json:
        emit({"out": str(out), **result})
    elif not quiet:
        peak = result["peak_memory"].get("allocated", result["peak_memory"]["process"])
        print(
            f"{out}: {result['ended']}; weights of step {result['weights_of_step']}; "
            f"{result['wall_seconds']:.0f} s, peak {gibibytes(peak)}, {result['padding']:.1%} padding"
        )
