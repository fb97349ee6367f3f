"""Save and restore everything that the next training step depends on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from neko_lean.checkpoints import (
    METRICS,
    WEIGHTS,
    RunFolder,
    RunState,
    Save,
    load_weights,
    random_states,
    set_random_states,
)
from neko_lean.models import CausalLM, peak_memory
from neko_lean.options import TrainingOptions
from neko_lean.outputs import write_in_place
from neko_lean.terminal import log_line
from neko_lean.training.optimizer import InBackwardAdam8bit
from neko_lean.training.trainer import Trainer


class Checkpointer:
    """Saves and restores a run.

    Args:
        trainer: holds the weights and the run's state.
        work: the run's work folder, to which saves are written.
        load_original: loads the model as it was at the start of the run, on the CPU.
        options: `seed` and `quiet` are used.
        memory_before: bytes that were in use before the student was loaded.
    """

    def __init__(
        self,
        trainer: Trainer,
        work: RunFolder,
        load_original: Callable[[], CausalLM],
        options: TrainingOptions,
        memory_before: int,
    ) -> None:
        self.trainer, self.work, self.load_original = trainer, work, load_original
        self.seed, self.quiet, self.memory_before = options.seed, options.quiet, memory_before
        self.device = trainer.student.device
        self.restored_save: Save | None = None  # the save that the run continues from
        self.start_time = 0.0  # on the monotonic clock, as if the run had never been interrupted

    def restore(self, save: Save | None, partial: RunState | None = None) -> None:
        """Continue from `save`, or from the beginning without one.

        `partial` is the state of a step that ran out of memory after it had changed some weights. The smaller pieces
        that were chosen then are kept.
        """
        # Weights, random generators and metrics.
        if save is not None:
            state = save.state
            load_weights(self.trainer.trainable, save.tensors(WEIGHTS))
            set_random_states(save.tensors("state", "random."), self.device)
            write_in_place(self.work.metrics, (save.folder / METRICS).read_bytes())
        else:
            state = RunState(self.trainer.recipe.micro_tokens)
            if partial is not None:
                load_weights(self.trainer.trainable, dict(self.load_original().model.named_parameters()))
            torch.manual_seed(self.seed)
            write_in_place(self.work.metrics, b"")

        # State.
        if partial is not None:
            state.micro_tokens, state.head_chunk = partial.micro_tokens, partial.head_chunk
            state.retain_exact = partial.retain_exact
        self.restored_save, self.start_time = save, time.monotonic() - state.wall
        self.trainer.load_state(state)

        if partial is not None or self.work.resume:
            start = f"resuming from step {state.step}" if save else "there is no save; starting from step 0"
            log_line(start, self.quiet)

    def restore_optimizer(self, optimizer: InBackwardAdam8bit) -> None:
        """Load the optimizer's state from the save that the run continues from, if there is one."""
        if self.restored_save is not None:
            optimizer.load_state_dict(self.restored_save.tensors("state", "optimizer."))

    def save(self, optimizer: InBackwardAdam8bit) -> None:
        """Write a save."""
        state = self.trainer.state
        state.wall = self.seconds()
        state.measured_peak = self.measured_peak()
        tensors = {f"optimizer.{name}": tensor for name, tensor in optimizer.state_dict().items()}
        tensors |= {f"random.{name}": tensor for name, tensor in random_states(self.device).items()}
        self.work.save(state, self.trainer.trainable, tensors)

    def seconds(self) -> float:
        """Seconds that the run has taken, including the time before an interruption."""
        return time.monotonic() - self.start_time

    def measured_peak(self) -> int:
        """Peak memory of the run in bytes, above what was in use before it; an interruption does not reset it."""
        return max(peak_memory(self.device, self.memory_before), self.trainer.state.measured_peak)
