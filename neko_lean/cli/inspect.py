"""`neko-lean inspect`: what a teacher cache was made from, what is in it, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from neko_lean.cli.common import Json, Quiet, command, emit
from neko_lean.terminal import print_table


@command
def inspect(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder that cache-teacher wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every checksum and every stored number.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a teacher cache was made from and what is in it; with --verify, whether it is whole.

    Example: neko-lean inspect cache/ --verify
    """
    from neko_lean.cache import inspect_cache

    about = inspect_cache(cache, verify=verify)
    if json:
        emit({"cache": str(cache), "verified": verify, **about})
        return
    if quiet:
        return
    table = Table(show_header=False)
    for key in (
        "model",
        "weights",
        "tokenizer",
        "format",
        "max_length",
        "teacher_dtype",
        "top_k",
        "mass",
        "vocab_size",
    ):
        table.add_row(key.replace("_", " "), str(about[key]))
    table.add_section()
    table.add_row("retain rows", f"{about['rows']} ({about['truncated']} cut)")
    table.add_row("rows with token losses", str(sum(shard["rows"] for shard in about["forget_shards"])))
    table.add_row("tokens", str(about["positions"]))
    table.add_row("bytes a token", f"{about['bytes_per_token']:.1f}")
    table.add_row("entries a token", f"{about['mean_entries']:.2f}")
    for bucket, share in about["entries_per_token"].items():
        table.add_row(f"  {bucket}", f"{share:7.2%} {'#' * round(40 * share)}")
    table.add_row("mean tail mass", f"{about['mean_tail_mass']:.2e}")
    table.add_row("mean entropy", f"{about['mean_entropy']:.3f} nats")
    table.add_section()
    table.add_row("verified", "every checksum and number" if verify else "no (--verify)")
    print_table(table)
