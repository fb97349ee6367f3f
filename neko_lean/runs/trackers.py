"""Send the metrics of a run to an experiment tracker: Trackio, Weights & Biases or TensorBoard.

Each needs its own package, which neko-lean does not install. The settings are the tracker's environment variables, as
transformers' Trainer reads them: TRACKIO_PROJECT and WANDB_PROJECT (here "neko-lean" by default), WANDB_MODE,
TENSORBOARD_LOGGING_DIR.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from neko_lean.distributed import is_main_process
from neko_lean.errors import NekoLeanError, did_you_mean, first_line
from neko_lean.terminal import log_line
from neko_lean.training import Callback

PROJECT = "neko-lean"

# A function that sends the metrics of a step, and one that ends the tracker's run.
_Tracker = tuple[Callback, Callable[[], None]]


def check_tracker(name: str | None) -> None:
    """Raise NekoLeanError for an unknown tracker, or one whose package is not installed."""
    if name is None:
        return
    if name not in _TRACKERS:
        raise NekoLeanError(f"--log-to {name!r} is not a known tracker{did_you_mean(name, _TRACKERS)}")
    if find_spec(name) is None:
        raise NekoLeanError(f"--log-to {name} needs the package {name}, which is not installed: pip install {name}.")


@contextmanager
def tracked(
    name: str | None, run_name: str, config: Mapping[str, Any], *, resumed: bool = False
) -> Iterator[Callback | None]:
    """The callback of a tracker, while the block runs; None without a tracker, and on all but the main process.

    A tracker that fails later, for example without a network, does not end the run: it gets no further metrics.

    Args:
        name: "trackio", "wandb", "tensorboard" or None.
        run_name: name of the run in the tracker.
        config: the recipe's values, which the tracker shows.
        resumed: continue the run of this name in Trackio. In TensorBoard, a run of the same name always continues; in
            Weights & Biases, each part of a resumed run is a separate run.

    Raises:
        NekoLeanError: the tracker cannot be started.
    """
    if name is None or not is_main_process():
        yield None
        return
    try:
        log, finish = _TRACKERS[name](run_name, dict(config), resumed)
    except Exception as error:  # the trackers raise many types
        raise NekoLeanError(f"--log-to {name} cannot be started ({first_line(error)}).") from error

    failed = False

    def callback(step: int, metrics: Mapping[str, Any]) -> None:
        nonlocal failed
        if not failed:
            failed = not _succeeds(name, partial(log, step, flat_metrics(metrics)))

    try:
        yield callback
    finally:
        _succeeds(name, finish)


def _succeeds(name: str, call: Callable[[], None]) -> bool:
    """Call a tracker. A failure is only a warning, because the trained model is worth more than its curves."""
    try:
        call()
    except Exception as error:  # the trackers raise many types
        log_line(
            f"warning: the metrics in {name} are incomplete, because it failed ({first_line(error)}); metrics.jsonl "
            f"holds them all."
        )
        return False
    return True


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the metrics of a step, those of a nested mapping under "outer/inner".

    Example:
        >>> flat_metrics({"loss": 0.5, "peak_memory": {"process": 7}, "step": 3})
        {'loss': 0.5, 'peak_memory/process': 7}
    """
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{inner}": number for inner, number in flat_metrics(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            flat[key] = value
    return flat


def _trackio(run_name: str, config: dict[str, Any], resumed: bool) -> _Tracker:
    trackio: Any = importlib.import_module("trackio")
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run = trackio.init(project=project, name=run_name, config=config, resume="allow" if resumed else "never")
    return lambda step, metrics: run.log(dict(metrics), step=step), trackio.finish


def _wandb(run_name: str, config: dict[str, Any], resumed: bool) -> _Tracker:
    wandb: Any = importlib.import_module("wandb")
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, name=run_name, config=config)
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish


def _tensorboard(run_name: str, config: dict[str, Any], resumed: bool) -> _Tracker:
    writers: Any = importlib.import_module("torch.utils.tensorboard")
    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(Path("runs") / run_name)
    writer = writers.SummaryWriter(folder)
    writer.add_text("recipe", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


_TRACKERS: dict[str, Callable[[str, dict[str, Any], bool], _Tracker]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
