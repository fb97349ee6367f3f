"""`neko-lean cache-teacher`: run the teacher once, keep its top-k probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Device, Json, Model, Overwrite, Quiet, Revision, command, emit, pinned
from neko_lean.distributed import is_main_process
from neko_lean.options import OutputOptions
from neko_lean.terminal import print_lines


@command
def cache_teacher(
    model: Model,
    retain: Annotated[Path, typer.Argument(help="Parquet, jsonl or csv file, or a folder holding retain.*.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    forget: Annotated[
        Path | None, typer.Option(help="Rows to forget, for recipes that ask the teacher about them: npo, dpo, undial.")
    ] = None,
    anchor: Annotated[
        Path | None, typer.Option(help="Documents never seen, to hold still: jsonl with document and, if wanted, task.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Most entries kept a position.")] = 64,
    mass: Annotated[
        float, typer.Option(help="Keep the fewest likeliest tokens that reach this; 1: top-k always.")
    ] = 0.999,
    format: Annotated[str, typer.Option(help="Prompt format, plain or neko; the recipe must use the same.")] = "plain",
    max_length: Annotated[int, typer.Option(help="Tokens a row is cut to.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Positions of one forward pass.")] = 8192,
    revision: Revision = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    stored_dtype: Annotated[str, typer.Option(help="float16 or float32, for the stored probabilities.")] = "float16",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    check: Annotated[
        int, typer.Option(min=0, metavar="N", help="Compute N rows again and fail unless the cache agrees.")
    ] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the teacher once over the retain set and store its top-k probabilities.

    Example: neko-lean cache-teacher allenai/OLMo-1B-0724-hf data/ --out cache/
    """
    from neko_lean.cache import CacheOptions, check_cache, inspect_cache
    from neko_lean.cache import cache_teacher as run

    made = run(
        pinned(model, revision),
        retain,
        out,
        forget=forget,
        anchor=anchor,
        cache=CacheOptions(
            top_k=top_k,
            mass=mass,
            format=format,
            max_length=max_length,
            batch_tokens=batch_tokens,
            dtype=dtype,
            stored_dtype=stored_dtype,
        ),
        run=OutputOptions(device=device, resume=resume, overwrite=overwrite, quiet=quiet),
    )
    if not is_main_process():
        return
    checked = check_cache(out, pinned(model, revision), retain, check, device=device) if check else None
    if json:
        emit({"cache": str(out), **inspect_cache(out), "check": checked})
    elif not quiet:
        size = sum(shard.bytes for shard in made.shards)
        print_lines(
            f"{out}: {made.rows} rows, {made.positions} positions, "
            f"{(size + sum(shard.bytes for shard in made.forget_shards)) / 1e6:.1f} MB "
            f"({size / made.positions:.1f} bytes a token, {made.entries / made.positions:.1f} entries); "
            f"mean mass in the entries: {made.mean_mass:.4f}"
        )
        if checked:
            print_lines(
                f"check: {checked['rows']} rows live; KL of cache to teacher {checked['kl_mean']:.1e} nats a position "
                f"(largest {checked['kl_max']:.1e}); captured mass {checked['mass_mean']:.4f} "
                f"(1st percentile {checked['mass_1st_percentile']:.4f})"
            )
