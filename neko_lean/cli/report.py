"""`neko-lean report`: one HTML page to show around."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Json, Quiet, command, emit
from neko_lean.terminal import print_lines


@command
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folders of score and of unlearn in any order, or one that holds them, as demo writes; "
            "SCORES=RUN where their names do not tell which belong together.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    before: Annotated[
        Path | None,
        typer.Option(help="Scores of the model before.  [default: of the model that the runs started from]"),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    no_texts: Annotated[
        bool, typer.Option("--no-texts", help="Leave out the rows and what was said: a page without personal data.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that neko-lean wrote.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page that shows what runs forgot, kept and gave away. It loads nothing and can be sent around.

    Example: neko-lean report scores-before/ scores-after/ unlearned/ --out report.html    or    report demo-run/
    """
    from neko_lean.report import TITLE
    from neko_lean.report import report as run

    made = run(runs, out, before=before, title=title or TITLE, texts=not no_texts, overwrite=overwrite)
    if json:
        emit(made)
    elif not quiet:
        shown = f"{made['rows']} rows" if made["rows"] else "no rows"
        print_lines(f"{made['out']}: {', '.join(made['models'])}; {shown}, {made['bytes'] / 1e6:.1f} MB")
        print_lines(*(f"  {name}: {word}" for name, word in made["words"].items()))
