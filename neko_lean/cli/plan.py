"""`neko-lean plan`: predict the memory of a run from the model's config alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from neko_lean.cli.common import Json, MemoryFlags, Model, Quiet, Revision, command, emit, gibibytes, pinned
from neko_lean.options import MEMORY, RECIPE, option


@dataclass(frozen=True, kw_only=True)
class PlanFlags(MemoryFlags):
    """The recipe that is planned."""

    batch_tokens: int | None = option(None, "Tokens of a step.  [default: the recipe's]", RECIPE, min=1)

    def overrides(self) -> dict[str, Any]:
        """The given recipe values, by key. For a recipe of `memorize`, which has no forget examples,
        `--batch-size` means its retain_rows, as there."""
        from neko_lean.recipe import forgets, load_recipe

        if self.batch_size is None or forgets(load_recipe(self.recipe)):
            return super().overrides()
        return replace(self, batch_size=None, set=(*self.set, f"retain_rows={self.batch_size}")).overrides()


@command
def plan(
    model: Model,
    recipe: PlanFlags,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of a GPU, such as 8GB, or a card, such as 'RTX 4090': find what fits.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Predict the memory of each GPU under torchrun with N processes.",
            rich_help_panel=MEMORY,
        ),
    ] = 1,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict how much GPU memory a run needs.

    It is compared with training with two models. Only the config is read, no weights.

    Example: neko-lean plan allenai/OLMo-1B-0724-hf --gpu 8GB
    """
    with _without_garbage_collection():
        from neko_lean.memory import plan as plan_memory

        name, overrides = pinned(model, revision), recipe.overrides()
        result = plan_memory(name, recipe=recipe.recipe, overrides=overrides, gpu=gpu, gpus=gpus, quiet=quiet or json)
    if json:
        emit(result)
    elif not quiet:
        _print_estimates(result)
        _print_notes(result)
        if gpu is not None:
            _print_fit(result, gpu)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Within this context, reference cycles are not searched for: the search takes a sixth of the time of a plan."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _print_estimates(result: dict[str, Any]) -> None:
    """Print a table with one column per setup and one row per line of its estimate; the rows add up to the peak."""
    from rich import box
    from rich.table import Table

    from neko_lean.memory import LINES
    from neko_lean.terminal import print_table

    estimates = result["ways"]
    title = result["title"] + (f"; neko-lean on each of {result['gpus']} GPUs" if result["gpus"] > 1 else "")
    table = Table(box=box.SIMPLE, title_justify="left", title=title)
    table.add_column("")
    for name in estimates:
        table.add_column(name, justify="right", max_width=22)

    for line in LINES:
        cells = [estimate["lines"].get(line) for estimate in estimates.values()]
        if any(cells):
            table.add_row(line, *("" if cell is None else gibibytes(cell) for cell in cells))

    table.add_section()
    table.add_row("peak on the device", *(gibibytes(estimate["peak"]) for estimate in estimates.values()))
    for line in result["ways"]["neko-lean"]["host_lines"]:
        table.add_row(f"{line}, in host memory", gibibytes(estimates["neko-lean"]["host_lines"][line]))
    on_cpu = [estimate["cpu_peak"] for estimate in estimates.values()]
    table.add_row("peak on a CPU instead", *("" if peak is None else gibibytes(peak) for peak in on_cpu))
    print_table(table)


def _print_notes(result: dict[str, Any]) -> None:
    """Say what the table does not: the fallback, host memory, the cache on disk, and the time of a step."""
    from neko_lean.terminal import print_lines

    step, cache = result["step"], result["cache"]
    notes = [] if result["fallback"] is None else [result["fallback"]]
    notes.append(
        "The peak on a CPU is the growth of the process's resident set, including allocator overhead and code loaded "
        "by the first step."
    )
    if result["ways"]["neko-lean"]["host"]:
        notes.append("Host memory is pinned; PyTorch rounds each tensor there up to a power of two bytes.")
    if cache is not None:
        notes.append(
            f"Teacher cache on disk: at most {cache['bytes_per_position']} bytes per position, "
            f"{gibibytes(cache['bytes'])} for {cache['rows']} full retain rows; {cache['measured']}."
        )
    seconds = ", ".join(f"{name} {value:.2g}" for name, value in step["seconds"].items())
    notes.append(
        f"Rough seconds a step: {seconds}. This is {step['flops'] / 1e12:.0f} TFLOP at {step['assumed_share']:.0%} of "
        f"the card's dense bfloat16 peak, without attention scores, the update, and transfers to host memory."
    )
    print_lines(*notes)


def _print_fit(result: dict[str, Any], gpu: str) -> None:
    """Say with which options the run fits the GPU."""
    from neko_lean.memory import CONTEXT
    from neko_lean.terminal import print_lines

    room = f"{gpu} less {gibibytes(CONTEXT)} for CUDA itself"
    if result["comparison"] is not None:
        _print_comparison(result["comparison"], gpu)
    options = result["options"]
    if options is None:
        print_lines(f"Does not fit {room}: {result['reason']}")
    elif options:
        fits = result["fits"]
        host = f", and {gibibytes(fits['host'])} of pinned host memory" if fits["host"] else ""
        print_lines(f"Fits {room} with {' '.join(options)}: peak {gibibytes(fits['peak'])}{host}.")
    else:
        print_lines(f"Fits {room} without further options.")


def _print_comparison(comparison: list[dict[str, Any]], gpu: str) -> None:
    """Print a table with one row for a full fine-tune and one for each kind of adapters."""
    from rich import box
    from rich.table import Table

    from neko_lean.memory import ADAM_STATE, STUDENT
    from neko_lean.terminal import print_table

    table = Table(box=box.SIMPLE, title_justify="left", title="What is trained")
    for name in ("", "weights", "Adam state", "peak", f"fits {gpu} with", "peak"):
        table.add_column(name, justify="right" if name and not name.startswith("fits") else "left")
    for setup in comparison:
        estimate, options, name = setup["estimate"], setup["options"], setup["name"]
        added = " ".join(options or []).removeprefix(name).strip() or "no further options"
        table.add_row(
            name,
            gibibytes(estimate["lines"].get(STUDENT, 0)),
            gibibytes(estimate["lines"].get(ADAM_STATE, 0)),
            gibibytes(estimate["peak"]),
            "does not fit" if options is None else added,
            "" if options is None else gibibytes(setup["fits"]["peak"]),
        )
    print_table(table)
