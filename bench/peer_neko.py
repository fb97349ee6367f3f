"""Worker of bench/peers.py: the steps of `neko-lean unlearn` with a teacher cache that was made before."""

from __future__ import annotations

from typing import Any

import bitsandbytes  # noqa: F401  # loaded by the optimizer, but imports are not counted
import torch
from peer_worker import StepClock, allocator_peak, now, read_job, report, wait_after_imports
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from neko_lean.cache import CacheOptions, cache_teacher
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.runs import unlearn


def cache(job: dict[str, Any]) -> None:
    """Cache the teacher's predictions on the retain and forget sets."""
    options = CacheOptions(format=job["format"], max_length=job["max_length"], dtype=job["dtype"])
    run = OutputOptions(device=job["device"], overwrite=True, quiet=True)
    device = torch.device(job["device"])
    start = now(device)
    cache_teacher(job["model"], job["cache"], retain=job["rows"], forget=job["rows"], cache=options, run=run)
    report("trained", peak=allocator_peak(device), seconds=now(device) - start)


def train(job: dict[str, Any]) -> None:
    """Run `unlearn` with its default backward pass."""
    clock = StepClock(job["device"], job["steps"])

    def end_step(step: int, metrics: Any) -> None:
        report("loss", step=step, loss=metrics["loss"])
        clock.end_step()

    unlearn(
        job["model"],
        job["out"],
        forget=job["rows"],
        retain=job["rows"] if job["with_retain"] else None,
        cache=job["cache"],
        recipe=job["recipe"],
        overrides=job["overrides"],
        callback=end_step,
        run=RunOptions(device=job["device"], overwrite=True, quiet=True),
    )


def main() -> None:
    job = read_job()
    wait_after_imports()
    if job["caches"]:
        cache(job)
    else:
        train(job)


if __name__ == "__main__":
    main()
