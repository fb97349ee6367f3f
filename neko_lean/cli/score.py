"""`neko-lean score`: did it forget, keep, or break?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from neko_lean.cli.common import Device, Json, Model, Overwrite, Quiet, Split, command, emit


@command
def score(
    model: Model,
    data: Annotated[Path, typer.Option(help="Folder holding forget.* and retain.*.")],
    out: Annotated[Path, typer.Option(help="Folder to write: generations.jsonl and scores.json.")],
    mia: Annotated[Path | None, typer.Option(help="Folder holding member.jsonl and nonmember.jsonl.")] = None,
    split: Split = None,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a generation.")] = 256,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.  [default: float32 on a CPU, bfloat16 on a GPU]")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model with the shared task's own arithmetic. What was not measured is called so.

    Example: neko-lean score unlearned/ --data data/ --mia data/mia --out scores/
    """
    from neko_lean.scoring.run import score as run
    from neko_lean.scoring.run import score_table

    result = run(
        model,
        data,
        out,
        mia=mia,
        split=split,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        quiet=quiet,
    )
    if json:
        emit({"out": str(out), **result})
    elif not quiet:
        Console().print(score_table({"score": result}))
