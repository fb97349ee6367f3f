"""`neko-lean unlearn`: forget, with the student as the only model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import (
    Device,
    Json,
    MaxSteps,
    Model,
    Overwrite,
    Quiet,
    Resume,
    Revision,
    SaveEvery,
    Seed,
    Set,
    command,
    emit,
    gibibytes,
    overrides,
    pinned,
)
from neko_lean.distributed import is_main_process
from neko_lean.recipes import DEFAULT
from neko_lean.terminal import print_lines


@command
def unlearn(
    model: Model,
    forget: Annotated[Path, typer.Option(help="Rows to forget: a file, or a folder holding forget.*.")],
    retain: Annotated[Path, typer.Option(help="Rows to hold still: a file, or a folder holding retain.*.")],
    out: Annotated[Path, typer.Option(help="Folder to write: checkpoint, tokenizer, run.json, metrics.jsonl.")],
    cache: Annotated[
        Path | None, typer.Option(help="What cache-teacher wrote.  [default: cached first, then thrown away]")
    ] = None,
    anchor: Annotated[
        Path | None, typer.Option(help="The documents that cache-teacher was given; without --cache, any never seen.")
    ] = None,
    base_cache: Annotated[
        Path | None, typer.Option(help="cache-teacher's of the model before it learned these rows, made with --forget.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Name of a shipped recipe, or a .toml file.")] = DEFAULT,
    set_: Set = None,
    max_steps: MaxSteps = None,
    train_last: Annotated[int | None, typer.Option(min=1, help="Only the last N layers (and the head) learn.")] = None,
    offload_state: Annotated[bool, typer.Option("--offload-state", help="Adam's state in host memory.")] = False,
    offload_activations: Annotated[
        bool, typer.Option("--offload-activations", help="The layers' inputs in host memory.")
    ] = False,
    state_bits: Annotated[int | None, typer.Option(help="Of Adam's state: 8, or 4 with torchao installed.")] = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = None,
    save_every: SaveEvery = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push the forget set out of the model and hold the retain set still, with one model in memory at any time.

    Example: neko-lean unlearn allenai/OLMo-1B-0724-hf --forget data/ --retain data/ --cache cache/ --out unlearned/
    """
    from neko_lean.runs import unlearn as run

    result = run(
        pinned(model, revision),
        out,
        forget,
        retain,
        cache=cache,
        anchor=anchor,
        base_cache=base_cache,
        recipe=recipe,
        overrides=overrides(
            set_,
            max_steps=max_steps,
            train_last=train_last,
            state_bits=state_bits,
            offload_state=offload_state or None,
            offload_activations=offload_activations or None,
        ),
        seed=seed,
        device=device,
        save_every=save_every,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )
    if not is_main_process():
        return
    if json:
        emit({"out": str(out), **result})
    elif not quiet:
        predicted = result["predicted_peak"]
        counted = " (resident set, with the allocator's share)" if result["device"] == "cpu" else ""
        print_lines(
            f"{out}: {result['ended']}; weights of step {result['weights_of_step']}; "
            f"{result['wall_seconds']:.0f} s, {result['padding']:.1%} padding",
            f"peak memory: {gibibytes(result['measured_peak'])} measured, "
            f"{'none' if predicted is None else gibibytes(predicted)} predicted{counted}",
        )
