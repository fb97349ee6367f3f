"""`neko-lean cache-teacher`: run the teacher once, keep its top-k probabilities."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Device, Json, Model, Overwrite, Quiet, command, emit


@command
def cache_teacher(
    model: Model,
    retain: Annotated[Path, typer.Argument(help="Parquet, jsonl or csv file, or a folder holding retain.*.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    top_k: Annotated[int, typer.Option(help="Entries kept a position.")] = 64,
    format: Annotated[str, typer.Option(help="Prompt format, plain or neko; the recipe must use the same.")] = "neko",
    max_length: Annotated[int, typer.Option(help="Tokens a row is cut to.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Positions of one forward pass.")] = 8192,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the teacher once over the retain set and store its top-k probabilities.

    Example: neko-lean cache-teacher allenai/OLMo-1B-0724-hf data/ --out cache/
    """
    from neko_lean.cache import cache_teacher as run

    manifest = run(
        model,
        retain,
        out,
        top_k=top_k,
        format=format,
        max_length=max_length,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        quiet=quiet,
    )
    size = sum(shard.bytes for shard in manifest.shards)
    if json:
        summary = asdict(manifest)
        summary["shards"] = [{"file": s.file, "bytes": s.bytes, "rows": len(s.rows)} for s in manifest.shards]
        emit({"cache": str(out), **summary})
    elif not quiet:
        print(
            f"{out}: {manifest.rows} rows, {manifest.positions} positions, {size / 1e6:.1f} MB "
            f"({size / manifest.positions:.0f} bytes a position); mean mass in the top {manifest.top_k}: "
            f"{manifest.mean_mass:.4f}"
        )
