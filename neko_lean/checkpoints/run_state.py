"""Where a run stands, apart from its tensors: step, best evaluation, counters, and torch's random generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RunState:
    """State of a run that is written to each save. The field names are keys of state.json."""

    micro_tokens: int
    """Most positions of a micro-batch: the recipe's, or fewer after CUDA ran out of memory."""

    head_chunk: int | None = None
    """Rows of the head's chunks if they were made smaller after CUDA ran out of memory."""

    step: int = 0
    """Steps done."""

    best: float | None = None
    """Score of the best evaluation so far, by the recipe's `choose`."""

    best_step: int = 0
    """Step of that evaluation; 0 if there was none."""

    worse: int = 0
    """Evaluations since the best one."""

    forgotten_step: int = 0
    """Step of the evaluation that found the forget set forgotten and the retain set retained, for `stop = "forgotten"`;
    0 if there was none."""

    retain_exact: float | None = None
    """Share of retain answers that the model gave before the first step, for `stop = "forgotten"`; None without any."""

    unseen: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Moving sums of the losses on the anchor, in nats: the student's, the teacher's, and what of the
    teacher's the student's reach."""

    positions: int = 0
    """Positions that the model worked on, including padding."""

    tokens: int = 0
    """Positions without padding."""

    waited: float = 0.0
    """Seconds that steps waited for their batch."""

    wall: float = 0.0
    """Seconds that the run has taken."""

    measured_peak: int = 0
    """Peak memory of the run in bytes, above what was in use before it."""

    largest: list[list[int]] = field(default_factory=list)
    """`[rows, length]` of each micro-batch of the step with the most positions."""

    wanted: list[int] = field(default_factory=list)
    """Positions of each of these micro-batches that reached the head."""


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's default generators, which dropout draws from."""
    states = {"host": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the states that `random_states` returned."""
    torch.set_rng_state(states["host"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
