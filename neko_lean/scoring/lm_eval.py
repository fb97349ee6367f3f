"""Other benchmarks, by EleutherAI's lm-evaluation-harness where it is installed: it fetches its tasks' data itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

from neko_lean.distributed import world_size
from neko_lean.errors import NekoLeanError, first_line

TORCHRUN = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK")


def lm_eval_tasks(
    folder: str | Path, tasks: Sequence[str], device: str, dtype: str, batch_size: int
) -> dict[str, dict[str, float]]:
    """The checkpoint in `folder` on the harness's tasks, each with its own number of shots: {task: {metric: value}}.

    Metrics are called as the harness calls them ('acc,none'); what is no finite number is left out. A group of tasks
    comes with its parts. Raises NekoLeanError when lm-eval is not installed or refuses the tasks.
    """
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise NekoLeanError("lm-eval is not installed: pip install 'neko-lean[lm-eval]'") from error
    # A dict, not the usual text: a comma in the folder's name would split that.
    model_args = {"pretrained": str(folder), "dtype": dtype, "trust_remote_code": False}
    try:
        with _apart():
            found = simple_evaluate(
                model="hf",
                model_args=model_args,
                tasks=list(tasks),
                device=device,
                batch_size=batch_size,
                log_samples=False,
            )
    except (KeyError, ValueError, OSError, ImportError) as error:  # unknown names, data or parts that are not there
        reason = first_line(error)
        raise NekoLeanError(f"lm-eval cannot run {', '.join(tasks)}: {reason}") from error
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


@contextmanager
def _apart() -> Iterator[None]:
    """Hide from the harness, which one rank runs, that there are others: accelerate would have it wait for them."""
    hidden = {name: os.environ.pop(name) for name in TORCHRUN} if world_size() > 1 else {}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _numbers(metrics: dict[str, object]) -> dict[str, float]:
    """The finite numbers among a task's metrics as Python's own: a numpy float is none to json."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, Real)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
