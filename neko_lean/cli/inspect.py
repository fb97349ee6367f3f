"""`neko-lean inspect`: what a teacher cache was made from, how large it is, and whether it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neko_lean.cli.common import Json, Quiet, command, emit
from neko_lean.options import OUTPUT

if TYPE_CHECKING:
    from rich.table import Table

# Fields of the manifest that the table shows unchanged.
_SETTINGS = (
    "model",
    "weights",
    "tokenizer",
    "format",
    "max_length",
    "teacher_dtype",
    "top_k",
    "mass",
    "shots",
    "vocab_size",
)


@command
def inspect(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder that cache-teacher wrote.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every checksum and every stored number.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a teacher cache was made from and how large it is. With --verify, check that it is intact.

    Example: neko-lean inspect cache/ --verify
    """
    from neko_lean.cache import inspect_cache
    from neko_lean.terminal import print_table

    about = inspect_cache(cache, verify=verify)
    if json:
        emit({"cache": str(cache), "verified": verify, **about})
    elif not quiet:
        print_table(_table(about, verified=verify))


def _table(about: dict[str, Any], verified: bool) -> Table:
    """The result of `inspect_cache` as a table of two columns."""
    from rich.table import Table

    table = Table(show_header=False)
    for key in _SETTINGS:
        table.add_row(key.replace("_", " "), str(about[key]))

    table.add_section()
    table.add_row("rows", f"{about['rows']} ({about['truncated']} truncated)")
    table.add_row("rows with token losses", str(sum(shard["rows"] for shard in about["forget_shards"])))
    table.add_row("positions", str(about["positions"]))
    table.add_row("bytes per position", f"{about['bytes_per_token']:.1f}")
    table.add_row("entries per position", f"{about['mean_entries']:.2f}")
    for bucket, share in about["entries_per_token"].items():
        table.add_row(f"  {bucket}", f"{share:7.2%} {'#' * round(40 * share)}")
    table.add_row("mean tail mass", f"{about['mean_tail_mass']:.2e}")
    table.add_row("mean entropy", f"{about['mean_entropy']:.3f} nats")

    table.add_section()
    table.add_row("verified", "every checksum and number" if verified else "no (--verify)")
    return table
