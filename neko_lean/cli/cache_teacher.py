"""`neko-lean cache-teacher`: run the teacher once and store its top-k probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cache.options import CacheOptions
from neko_lean.cli.common import Json, Model, Revision, command, emit, pinned
from neko_lean.distributed import is_main_process
from neko_lean.options import OutputOptions
from neko_lean.terminal import print_lines


@command
def cache_teacher(
    model: Model,
    retain: Annotated[Path, typer.Argument(help="Parquet, jsonl or csv file, or a folder that holds retain.*.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    cache: CacheOptions,
    run: OutputOptions,
    forget: Annotated[
        Path | None, typer.Option(help="Forget set, for recipes that compare with the teacher on it: npo, dpo, undial.")
    ] = None,
    anchor: Annotated[
        Path | None, typer.Option(help="Unseen documents (jsonl: document, optionally task) to preserve as well.")
    ] = None,
    check: Annotated[
        int, typer.Option(min=0, metavar="N", help="Recompute N examples and fail unless the cache agrees.")
    ] = 0,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Run the teacher once over the retain set and store its top-k probabilities.

    Example: neko-lean cache-teacher allenai/OLMo-1B-0724-hf data/ --out cache/
    """
    from neko_lean.cache import cache_teacher as write_cache
    from neko_lean.cache import check_cache, inspect_cache

    name = pinned(model, revision)
    manifest = write_cache(name, retain, out, forget=forget, anchor=anchor, cache=cache, run=run)
    if not is_main_process():
        return
    checked = check_cache(out, name, retain, check, device=run.device) if check else None
    if json:
        emit({"cache": str(out), **inspect_cache(out), "check": checked})
    elif not run.quiet:
        size = sum(shard.bytes for shard in manifest.shards)
        print_lines(
            f"{out}: {manifest.rows} rows, {manifest.positions} positions, "
            f"{(size + sum(shard.bytes for shard in manifest.forget_shards)) / 1e6:.1f} MB "
            f"({size / manifest.positions:.1f} bytes per token, {manifest.entries / manifest.positions:.1f} entries); "
            f"mean mass in the entries: {manifest.mean_mass:.4f}"
        )
        if checked:
            print_lines(
                f"check: {checked['rows']} rows recomputed; KL of cache to teacher {checked['kl_mean']:.1e} nats per "
                f"position (largest {checked['kl_max']:.1e}); captured mass {checked['mass_mean']:.4f} "
                f"(1st percentile {checked['mass_1st_percentile']:.4f})"
            )
