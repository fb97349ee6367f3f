"""Further benchmarks through EleutherAI's lm-evaluation-harness, an optional package that downloads its own data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

from neko_lean.distributed import world_size
from neko_lean.errors import NekoLeanError, first_line
from neko_lean.extras import require_extra

TORCHRUN = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK")


def lm_eval_tasks(
    folder: str | Path, tasks: Sequence[str], device: str, dtype: str, batch_size: int
) -> dict[str, dict[str, float]]:
    """Evaluate a checkpoint on tasks of lm-evaluation-harness, each with the number of shots that it defines.

    Args:
        folder: the checkpoint.
        tasks: names of tasks or groups of tasks.
        device: as PyTorch names it.
        dtype: as PyTorch names it.
        batch_size: sequences per batch.

    Returns:
        For each task, and for each task of a group, its finite metrics by the harness's names ('acc,none').

    Raises:
        NekoLeanError: lm-eval is not installed or cannot run the tasks.
    """
    require_extra("lm_eval", "lm-eval", "--lm-eval")
    from lm_eval import simple_evaluate

    # A dict instead of the usual text, which would be split at a comma in the folder's name.
    model_args = {"pretrained": str(folder), "dtype": dtype, "trust_remote_code": False}
    try:
        with _single_process_environment():
            results = simple_evaluate(
                model="hf",
                model_args=model_args,
                tasks=list(tasks),
                device=device,
                batch_size=batch_size,
                log_samples=False,
            )
    except (KeyError, ValueError, OSError, ImportError) as error:  # an unknown task, or missing data or packages
        reason = first_line(error)
        raise NekoLeanError(f"lm-eval cannot run {', '.join(tasks)}: {reason}") from error
    return {task: _finite_numbers(metrics) for task, metrics in results["results"].items()}


@contextmanager
def _single_process_environment() -> Iterator[None]:
    """Hide the other ranks from the harness, which only one rank runs; accelerate would wait for them otherwise."""
    hidden = {name: os.environ.pop(name) for name in TORCHRUN} if world_size() > 1 else {}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _finite_numbers(metrics: dict[str, object]) -> dict[str, float]:
    """The finite numbers among a task's metrics as Python floats, because json cannot write those of numpy."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, Real)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
