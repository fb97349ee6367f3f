"""`neko-lean unlearn`: forget, with the student as the only model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from neko_lean.cli.common import (
    Json,
    MemoryFlags,
    Model,
    Revision,
    TrainingFlags,
    command,
    emit,
    gibibytes,
    pinned,
    print_training_plan,
)
from neko_lean.options import DATA, OUTPUT, TEACHER, RunOptions, option


@dataclass(frozen=True, kw_only=True)
class UnlearnFlags(MemoryFlags, TrainingFlags):
    """A recipe for unlearning, with options for values that are often changed or determine memory."""


@dataclass(frozen=True, kw_only=True)
class TeacherFlags:
    """Where the teacher's probabilities come from."""

    cache: Path | None = option(
        None, "Folder that cache-teacher wrote.  [default: made first, deleted at the end]", TEACHER
    )
    anchor: Path | None = option(
        None, "What the model has never seen; with --cache, the file that cache-teacher was given.", TEACHER
    )
    base_cache: Path | None = option(
        None,
        "Cache of the model before it learned the forget set, made with cache-teacher --forget and --anchor.",
        TEACHER,
    )


@command
def unlearn(
    model: Model,
    *,
    forget: Annotated[
        str,
        typer.Option(
            help="Forget set: a file, a folder with forget.* or of texts, or a hub data set.", rich_help_panel=DATA
        ),
    ],
    retain: Annotated[
        str | None,
        typer.Option(
            help="Retain set: examples whose behaviour is preserved.  [default: written by the model itself]",
            rich_help_panel=DATA,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="Folder to write: checkpoint, tokenizer, run.json, metrics.jsonl.", rich_help_panel=OUTPUT),
    ],
    teacher: TeacherFlags,
    recipe: UnlearnFlags,
    run: RunOptions,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Train a model to forget the forget set and preserve its behaviour on the retain set.

    A KL term against the frozen teacher preserves it. Only one model is in memory at any time.

    Example: neko-lean unlearn allenai/OLMo-1B-0724-hf --forget data/ --retain data/ --cache cache/ --out unlearned/

    With nothing but the data to forget: neko-lean unlearn chat-model/ --forget secrets.txt --out unlearned/
    """
    from neko_lean.distributed import is_main_process
    from neko_lean.runs import unlearn as run_unlearn

    result = run_unlearn(
        pinned(model, revision),
        out,
        forget=forget,
        retain=retain,
        cache=teacher.cache,
        anchor=teacher.anchor,
        base_cache=teacher.base_cache,
        recipe=recipe.recipe,
        overrides=recipe.overrides(),
        run=run,
    )
    if not is_main_process():
        return
    if json:
        emit({"out": str(out), **result})
    elif run.quiet:
        return
    elif "dry_run" in result:
        print_training_plan(result)
    else:
        _print_summary(out, result)


def _print_summary(out: Path, result: dict[str, Any]) -> None:
    from neko_lean.terminal import print_lines

    print_lines(
        f"{out}: {result['ended']}; weights of step {result['weights_of_step']}; "
        f"{result['wall_seconds']:.0f} s, {result['padding']:.1%} padding",
        _peak_line(result["measured_peak"], result["predicted_peak"], on_cpu=result["device"] == "cpu"),
    )


def _peak_line(measured: int, predicted: int | None, *, on_cpu: bool) -> str:
    """Measured and predicted peak memory; on a CPU, also what is measured, or why a small peak says little."""
    from neko_lean.memory import PREDICTABLE_CPU_PEAK

    line = f"peak memory: {gibibytes(measured)} measured, "
    line += f"{'none' if predicted is None else gibibytes(predicted)} predicted"
    if not on_cpu:
        return line
    line += " (growth of the resident set, including the allocator's overhead)"
    if predicted is not None and min(measured, predicted) < PREDICTABLE_CPU_PEAK:
        line += (
            f"; below {gibibytes(PREDICTABLE_CPU_PEAK)} on a CPU, libraries and freed memory that the allocator keeps "
            f"make up much of the measured peak, so it can be 0.1 GiB above the prediction"
        )
    return line
