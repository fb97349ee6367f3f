"""`neko-lean cache-teacher`: run the teacher once and store its top-k probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neko_lean.cli.common import Json, Model, Revision, command, emit, pinned, planned_output
from neko_lean.options import DATA, OUTPUT, CacheOptions, OutputOptions

if TYPE_CHECKING:
    from neko_lean.cache.format import Manifest


@command
def cache_teacher(
    model: Model,
    *,
    retain: Annotated[
        str | None,
        typer.Argument(help="Retain set: a file, a folder with retain.* or of texts, or a hub data set."),
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option(
            help="Forget set: calibrated reads its losses; npo, dpo, undial, edited and --base-cache need it.",
            rich_help_panel=DATA,
        ),
    ] = None,
    anchor: Annotated[
        Path | None,
        typer.Option(
            help="What the model has never seen: documents, or rows like those to forget.",
            rich_help_panel=DATA,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.", rich_help_panel=OUTPUT)],
    cache: CacheOptions,
    run: OutputOptions,
    check: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Compare N examples with the live teacher; fail if they differ.",
            rich_help_panel=OUTPUT,
        ),
    ] = 0,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Run the teacher once over the retain set and store its top-k probabilities.

    Example: neko-lean cache-teacher allenai/OLMo-1B-0724-hf data/ --forget data/ --anchor unseen.jsonl --out cache/

    Without a retain set: neko-lean cache-teacher chat-model/ --self-generated 256 --forget secrets.json --out cache/

    For --base-cache: neko-lean cache-teacher before/ data/ --forget data/ --anchor unseen.jsonl --shots 2 --out base/
    """
    from neko_lean.cache import cache_teacher as write_cache
    from neko_lean.cache import check_cache, inspect_cache
    from neko_lean.distributed import is_main_process
    from neko_lean.terminal import print_lines

    name = pinned(model, revision)
    manifest = write_cache(name, out, retain=retain, forget=forget, anchor=anchor, cache=cache, run=run)
    if not is_main_process():
        return
    if run.dry_run:
        plan = {"dry_run": True, "out": str(out), "replaces": out.exists(), **_sizes(manifest, cache)}
        if json:
            emit(plan)
        elif not run.quiet:
            print_lines(*planned_output(plan), _planned_line(plan))
        return
    comparison = None
    if check:
        comparison = check_cache(
            out,
            name,
            check,
            retain=retain,
            forget=forget,
            cache=cache,
            device=run.device,
        )
    if json:
        emit({"cache": str(out), **inspect_cache(out), "check": comparison})
    elif not run.quiet:
        print_lines(_summary(out, manifest))
        if comparison:
            print_lines(_comparison_line(comparison))


def _summary(out: Path, manifest: Manifest) -> str:
    """One line with the size of a cache."""
    retain_bytes = sum(shard.bytes for shard in manifest.shards)
    all_bytes = sum(shard.bytes for shard in manifest.all_shards)
    return (
        f"{out}: {manifest.rows} rows, {manifest.positions} positions, {all_bytes / 1e6:.1f} MB "
        f"({retain_bytes / manifest.positions:.1f} bytes and {manifest.entries / manifest.positions:.1f} entries per "
        f"position); mean mass in the entries: {manifest.mean_mass:.4f}"
    )


def _sizes(manifest: Manifest, options: CacheOptions) -> dict[str, int]:
    """The size of a planned cache; what only the teacher's output determines is missing."""
    return {
        "rows": manifest.rows,
        "positions": manifest.positions,
        "forget_rows": sum(len(shard.rows) for shard in manifest.forget_shards),
        "shards": len(manifest.all_shards),
        "self_generated": options.self_generated,
    }


def _planned_line(plan: dict[str, Any]) -> str:
    """One line with the size of a planned cache."""
    written = f", and {plan['self_generated']} rows that the teacher would write" if plan["self_generated"] else ""
    return (
        f"  {plan['rows']} rows of {plan['positions']} positions, {plan['forget_rows']} rows with token losses, in "
        f"{plan['shards']} shards{written}"
    )


def _comparison_line(comparison: dict[str, float]) -> str:
    """One line with the result of `check_cache`."""
    return (
        f"check: {comparison['rows']} rows compared with the live teacher; KL from cache to teacher "
        f"{comparison['kl_mean']:.1e} nats per position (maximum {comparison['kl_max']:.1e}); mass in the entries "
        f"{comparison['mass_mean']:.4f} (1st percentile {comparison['mass_1st_percentile']:.4f})"
    )
