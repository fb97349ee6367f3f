"""What one step and one evaluation do to the model, in pieces as small as the GPU's memory asks for.

It trains on whatever `step.batch_losses` gives and knows no files. Which steps there are, and what is kept of them, is
the loop's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

from neko_lean.cache import TeacherCache
from neko_lean.checkpoints import RunState
from neko_lean.distributed import any_rank, run_on_main_and_broadcast, world_size
from neko_lean.errors import NonFiniteError, PartialStepError
from neko_lean.models import CausalLM, refuse_unknown_rows, supports_packing
from neko_lean.recipes import Recipe, trains_on_teacher
from neko_lean.terminal import log_line
from neko_lean.training.backward import select_backward
from neko_lean.training.batch import Batch, make_batch, select_hidden
from neko_lean.training.determinism import deterministic_device
from neko_lean.training.evaluation import answers, quality
from neko_lean.training.examples import TrainingExamples
from neko_lean.training.layerwise import compile_layers, decoder_layers
from neko_lean.training.losses import batch_losses
from neko_lean.training.optimizer import InBackwardAdam8bit, refuse_not_finite
from neko_lean.training.out_of_memory import shrink

EMA_DECAY = 0.9  # how much of the anchor's last losses a step keeps


SETS = ("forget", "retain")


Rows = tuple[Sequence[int], Sequence[int]]  # of a step, forget and retain, by number


T = TypeVar("T")


def prefetched(make: Callable[[], T]) -> Generator[T, None, None]:
    """What `make` returns, again and again, each made in a thread of its own while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make)
        while True:
            one = coming.result()
            coming = pool.submit(make)
            yield one


def drift(unseen: Sequence[float]) -> float:
    """What unseen text costs the student now, as a multiple of what it cost the teacher: forgotten text is to cost as
    much as it, so that the levels follow."""
    student, teacher = unseen
    return student / teacher if teacher > 0 else 1.0


class Trainer:
    """A student on its rows: takes steps, looks at samples, and counts both in `state`."""

    def __init__(
        self,
        student: CausalLM,
        examples: TrainingExamples,
        teacher: TeacherCache | None,
        recipe: Recipe,
        pad_id: int,
        device: torch.device | None = None,
    ) -> None:
        refuse_unknown_rows([*examples.forget, *examples.retain, *(examples.substitutes or [])], student)
        self.student, self.pad_id = student, pad_id
        self.packed = supports_packing(student)
        # Asked for while the student is whole and has its own forward.
        self.deterministic_on = deterministic_device(student)
        self.recipe, self.walk = select_backward(student, recipe, device or student.device)
        self.forget, self.retain, self.substitutes = examples.forget, examples.retain, examples.substitutes
        self.teacher = teacher
        self.learning = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
        self.state = RunState(recipe.micro_tokens)
        if recipe.compile:
            compile_layers(self.walk.layers if self.walk else decoder_layers(student))

    def load_state(self, state: RunState) -> None:
        """Stand where `state` says, the weights being those of its step already."""
        self.state = state
        self.recipe = dataclasses.replace(self.recipe, micro_tokens=state.micro_tokens)

    def batch(self, rows: Rows) -> Batch:
        """The batch of these rows."""
        forget, retain = rows
        forget_examples = [self.forget[i] for i in forget] if self.recipe.forget is not None else []
        retain_examples = [self.retain[i] for i in retain]
        others = [self.substitutes[i] for i in forget] if self.substitutes else []
        return make_batch(
            forget_examples,
            retain_examples,
            self.teacher,
            self.recipe,
            self.pad_id,
            self.student.device,
            others,
            self.packed,
        )

    def ready(self) -> None:
        """Dropout is off, as it was for the teacher, unless the recipe asks for it."""
        self.student.model.train(self.recipe.dropout)

    def step(
        self, optimizer: InBackwardAdam8bit, lr: float, rows: Rows, batch: Batch
    ) -> tuple[Batch, dict[str, float]]:
        """Take a step on `batch`, which holds `rows`, or on the same rows in smaller pieces where the GPU's memory runs
        out; returns the batch it took, and its losses.

        Raises NotFinite when a loss or gradient is no number, and TornError when the memory ran out too late: with the
        next step the weights must go back to where they were whole.
        """
        optimizer.begin_step(lr)
        while (values := self._attempt(optimizer, batch)) is None:
            batch = self.batch(rows)
        state = self.state
        state.step += 1
        micro, _ = batch.on_this_rank()
        if sum(ids.numel() for ids in micro.input_ids) > sum(rows * length for rows, length in state.largest):
            state.largest = [list(ids.shape) for ids in micro.input_ids]
            state.wanted = [len(one) for one in micro.index]
        state.positions += batch.positions
        state.tokens += batch.tokens
        return batch, values

    def _attempt(self, optimizer: InBackwardAdam8bit, batch: Batch) -> dict[str, float] | None:
        """Forward, backward and update; the losses, or None where the GPU's memory ran out before a weight was touched:
        the next attempt is to be smaller. Raises TornError where some were."""
        try:
            return self._update(optimizer, batch)
        except torch.OutOfMemoryError:
            if world_size() > 1:  # the other ranks are in the middle of the step
                raise
        # Out here, where the exception has let go of the step's tensors.
        if self.walk is not None:
            self.walk.clear()
        for parameter in self.learning.values():
            parameter.grad = None
        self._shrink(batch)
        if optimizer.updated:
            raise PartialStepError
        return None

    def _shrink(self, batch: Batch) -> None:
        """From now on work in smaller pieces than `batch` had."""
        less = shrink(self.state, batch, len(self.student.head))
        log_line(f"warning: the GPU's memory ran out behind step {self.state.step}: going on with {less}.")
        self.recipe = dataclasses.replace(self.recipe, micro_tokens=self.state.micro_tokens)
        if self.student.device.type == "cuda":
            torch.cuda.empty_cache()

    def _update(self, optimizer: InBackwardAdam8bit, batch: Batch) -> dict[str, float]:
        """One step's forward, backward and update. Raises NotFinite, which says whether weights were touched."""
        state = self.state
        if self.walk is None:
            hidden = select_hidden(self.student, batch.micro)
        else:
            hidden = self.walk.forward(batch.on_this_rank()[0])
        losses = self._losses(hidden, batch)
        values = {name: loss.item() for name, loss in losses.items()}
        del hidden
        unseen = state.unseen
        if "anchor_nll" in values:
            now = values.pop("anchor_nll"), values.pop("anchor_teacher_nll")
            unseen = [EMA_DECAY * old + new for old, new in zip(unseen, now, strict=True)]
            values["drift"] = drift(unseen)
        if any_rank(not math.isfinite(values["loss"]), self.student.device):
            raise NonFiniteError(f"the loss became {values['loss']} at step {state.step + 1}, before its update")
        try:
            losses["loss"].backward()
            if self.walk is not None:
                for name, gradient in self.walk.pending_grads():
                    refuse_not_finite(name, gradient)
                self.walk.backward(optimizer.update)
        except NonFiniteError as error:
            when = "in the middle of" if optimizer.updated else "before"
            raise NonFiniteError(f"{error} at step {state.step + 1}, {when} its update") from error
        state.unseen = unseen
        return values

    def _losses(self, hidden: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        now = drift(self.state.unseen)
        return batch_losses(hidden, self.student, batch, self.recipe, now, self.state.head_chunk)

    @torch.no_grad()
    def evaluate(self, sample: Rows) -> dict[str, float]:
        """Losses and answers of a sample."""
        self.student.model.eval()
        while True:
            batch = self.batch(sample)
            try:
                with nullcontext() if self.walk is None or self.walk.shards is None else self.walk.shards.whole():
                    values = self._look(batch, sample)
                break
            except torch.OutOfMemoryError:
                if world_size() > 1:
                    raise
            self._shrink(batch)
        self.ready()
        return run_on_main_and_broadcast(lambda: values)  # what is decided by them is decided alike

    def _look(self, batch: Batch, sample: Rows) -> dict[str, float]:
        """What an evaluation finds."""
        losses = self._losses(select_hidden(self.student, batch.on_this_rank()[0]), batch)
        values = {f"eval_{name}": loss.item() for name, loss in losses.items() if name.endswith("loss")}
        if trains_on_teacher(self.recipe):
            values["eval_retain_kl"] = values["eval_retain_loss"]
        for name, rows, chosen in zip(SETS, (self.forget, self.retain), sample, strict=True):
            # An anchor's documents have no prompt, so all of them would be answer.
            asked = [rows[i] for i in chosen if rows[i].prompt_length]
            found = answers(self.student, asked, self.pad_id, self.recipe.micro_tokens)
            values |= {f"eval_{name}_{key}": value for key, value in found.items()}
        values["eval_quality"] = quality(values)
        return values
