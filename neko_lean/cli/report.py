"""`neko-lean report`: one HTML page about scored models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Json, Quiet, command, emit
from neko_lean.options import DATA, OUTPUT


@command
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Output folders of score and unlearn in any order, or a folder that holds them, as demo writes; "
            "SCORES=RUN for a pair that cannot be matched by name.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.", rich_help_panel=OUTPUT)] = Path("report.html"),
    before: Annotated[
        Path | None,
        typer.Option(
            help="Scores of the model before unlearning.  [default: of the model that the runs started from]",
            rich_help_panel=DATA,
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.", rich_help_panel=OUTPUT)] = None,
    no_texts: Annotated[
        bool,
        typer.Option(
            "--no-texts",
            help="Leave out the rows and generations, for a page without personal data.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that neko-lean wrote.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an HTML page that shows what runs forgot, preserved and leaked. It is one file that loads nothing.

    Example: neko-lean report scores-before/ scores-after/ unlearned/ --out report.html    or    report demo-run/
    """
    from neko_lean.reporting import TITLE
    from neko_lean.reporting import report as write_report
    from neko_lean.terminal import print_lines

    result = write_report(runs, out, before=before, title=title or TITLE, texts=not no_texts, overwrite=overwrite)
    if json:
        emit(result)
    elif not quiet:
        rows = f"{result['rows']} rows" if result["rows"] else "no rows"
        print_lines(f"{result['out']}: {', '.join(result['models'])}; {rows}, {result['bytes'] / 1e6:.1f} MB")
        print_lines(*(f"  {name}: {phrase}" for name, phrase in result["words"].items()))
