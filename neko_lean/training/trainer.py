"""One training step and one evaluation, in pieces as small as the GPU's memory requires.

`Trainer` knows nothing about files. The training loop decides which steps are taken and what is saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from neko_lean.cache import TeacherCache
from neko_lean.checkpoints import RunState
from neko_lean.distributed import any_rank, run_on_main_and_broadcast, world_size
from neko_lean.errors import NonFiniteError, PartialStepError
from neko_lean.models import CausalLM, refuse_unknown_examples, supports_packing
from neko_lean.recipe import Recipe
from neko_lean.terminal import log_line
from neko_lean.training.backward import select_backward
from neko_lean.training.batch import Batch, make_batch, select_hidden
from neko_lean.training.determinism import deterministic_device
from neko_lean.training.evaluation import answer_metrics, quality
from neko_lean.training.examples import TrainingExamples
from neko_lean.training.layers import compile_layers, decoder_layers
from neko_lean.training.losses import batch_losses
from neko_lean.training.optimizer import InBackwardAdam8bit, refuse_non_finite
from neko_lean.training.out_of_memory import shrink

# Decay of the moving sums of the losses on the anchor.
EMA_DECAY = 0.9

# Indices of a step's forget and retain examples.
StepIndices = tuple[Sequence[int], Sequence[int]]


def drift(unseen: Sequence[float]) -> float:
    """The factor by which the levels follow the student's loss on unseen text.

    Args:
        unseen: moving sums of the losses on the anchor: the student's, the teacher's, and what of the
            teacher's the student's reach.
    """
    student, teacher, _ = unseen
    return student / teacher if teacher > 0 else 1.0


class Trainer:
    """A student with the examples of a run. It takes steps, evaluates, and counts both in `state`.

    Args:
        student: the model to train. With several ranks, it is sharded across them.
        pad_id: id of the padding token.
        examples: the run's examples.
        teacher: cache of the teacher's outputs, if the recipe needs one.
        recipe: the run's recipe.
        device: this rank's device; the student's by default.

    Raises NekoLeanError if the student cannot be trained on these examples as the recipe says.
    """

    def __init__(
        self,
        student: CausalLM,
        pad_id: int,
        examples: TrainingExamples,
        teacher: TeacherCache | None,
        recipe: Recipe,
        device: torch.device | None = None,
        base: TeacherCache | None = None,
    ) -> None:
        refuse_unknown_examples([*examples.forget, *examples.retain, *examples.substitutes], student)
        self.student, self.pad_id, self.examples, self.teacher = student, pad_id, examples, teacher
        self.base = base
        self.packed = supports_packing(student)

        # Checked before the student is sharded or its forward is replaced.
        self.deterministic_on = deterministic_device(student)

        self.recipe, self.layer_pass = select_backward(student, recipe, device or student.device)
        self.trainable = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
        self.state = RunState(recipe.micro_tokens)
        if recipe.compile:
            compile_layers(self.layer_pass.layers if self.layer_pass else decoder_layers(student))

    def load_state(self, state: RunState) -> None:
        """Continue from `state`. The student must have the weights of that step already."""
        self.state = state
        self.recipe = dataclasses.replace(self.recipe, micro_tokens=state.micro_tokens)

    def train_mode(self) -> None:
        """Enable dropout if the recipe asks for it. Without it, the student runs as the teacher did."""
        self.student.model.train(self.recipe.dropout)

    def new_optimizer(self, seed: int) -> InBackwardAdam8bit:
        """An optimizer of the trainable parameters, as the recipe describes it.

        Args:
            seed: random seed of the stochastic rounding.
        """
        recipe = self.recipe
        return InBackwardAdam8bit(
            self.trainable.items(),
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
            bits=recipe.state_bits,
            offload=recipe.offload_state,
            seed=seed,
        )

    def batch(self, indices: StepIndices) -> Batch:
        """The batch of the examples with these indices."""
        forget_indices, retain_indices = indices
        examples = self.examples
        forget_examples = [examples.forget[i] for i in forget_indices] if self.recipe.forget is not None else []
        retain_examples = [examples.retain[i] for i in retain_indices]
        substitutes = [examples.substitutes[i] for i in forget_indices] if examples.substitutes else []
        return make_batch(
            forget_examples,
            retain_examples,
            self.teacher,
            self.recipe,
            self.pad_id,
            self.student.device,
            substitutes,
            self.packed,
            self.base,
        )

    # Steps

    def step(
        self, optimizer: InBackwardAdam8bit, lr: float, indices: StepIndices, batch: Batch
    ) -> tuple[Batch, dict[str, float]]:
        """Take one training step. If CUDA runs out of memory, it is retried in smaller pieces.

        Args:
            optimizer: updates the parameters during the backward pass.
            lr: learning rate.
            indices: the step's examples.
            batch: the batch of these examples.

        Returns the batch that was used, and the losses by name.

        Raises NonFiniteError if the loss or a gradient is not finite, and PartialStepError if memory ran out after some
        weights had been updated. In both cases the weights have to be restored.
        """
        optimizer.begin_step(lr)
        while (losses := self._attempt(optimizer, batch)) is None:
            batch = self.batch(indices)

        # Count the step.
        state = self.state
        state.step += 1
        micro, _ = batch.on_this_rank()
        if sum(ids.numel() for ids in micro.input_ids) > sum(rows * length for rows, length in state.largest):
            state.largest = [list(ids.shape) for ids in micro.input_ids]
            state.wanted = [len(positions) for positions in micro.index]
        state.positions += batch.positions
        state.tokens += batch.tokens
        return batch, losses

    def _attempt(self, optimizer: InBackwardAdam8bit, batch: Batch) -> dict[str, float] | None:
        """Forward, backward and update. Returns the losses, or None if the step has to be retried in smaller pieces.

        Raises PartialStepError if CUDA ran out of memory after some weights had been updated.
        """
        try:
            return self._update(optimizer, batch)
        except torch.OutOfMemoryError:
            if world_size() > 1:  # the other ranks are in the middle of the step
                raise

        # Clean up outside of the handler, where the exception no longer keeps the step's tensors alive.
        if self.layer_pass is not None:
            self.layer_pass.clear()
        for parameter in self.trainable.values():
            parameter.grad = None
        self._shrink(batch, f"in step {self.state.step + 1}")
        if optimizer.updated:
            raise PartialStepError
        return None

    def _update(self, optimizer: InBackwardAdam8bit, batch: Batch) -> dict[str, float]:
        """One step's forward pass, backward pass and update. Returns the losses by name."""
        # Forward.
        losses = self._losses(self._hidden(batch), batch)
        values = {name: loss.item() for name, loss in losses.items()}

        # Moving sums of the losses on unseen documents. They are stored only once the step is complete.
        unseen = self.state.unseen
        if "anchor_nll" in values:
            new = [values.pop(name) for name in ("anchor_nll", "anchor_teacher_nll", "anchor_attained")]
            unseen = [EMA_DECAY * old_sum + loss for old_sum, loss in zip(unseen, new, strict=True)]
            values["drift"] = drift(unseen)

        # Check the loss before any weight changes.
        next_step = self.state.step + 1
        if any_rank(not math.isfinite(values["loss"]), self.student.device):
            raise NonFiniteError(f"the loss became {values['loss']} at step {next_step}, before its update")

        # Backward, with updates as soon as gradients are complete.
        try:
            losses["loss"].backward()
            if self.layer_pass is not None:
                for name, grad in self.layer_pass.pending_grads():
                    refuse_non_finite(name, grad)
                self.layer_pass.backward(optimizer.update)
        except NonFiniteError as error:
            when = "in the middle of" if optimizer.updated else "before"
            raise NonFiniteError(f"{error} at step {next_step}, {when} its update") from error

        self.state.unseen = unseen
        return values

    def _hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [n, d] at the positions of this rank, with gradient."""
        if self.layer_pass is None:
            return select_hidden(self.student, batch.micro)
        return self.layer_pass.forward(batch.on_this_rank()[0])

    def _losses(self, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch as scalars, from hidden states [n, d]."""
        factor = drift(self.state.unseen)
        return batch_losses(hidden, self.student, batch, self.recipe, factor, self.state.head_chunk, self.unseen_share)

    @property
    def unseen_share(self) -> float | None:
        """How much of the base model's losses on the anchor the student's reach, see `attained_share`; None before the
        first batch with anchor examples, and for an objective that does not learn the base model's distributions."""
        _, of_base, attained = self.state.unseen
        learns_base = self.recipe.forget is not None and self.recipe.forget.base_top_k
        return attained / of_base if learns_base and attained > 0 else None

    def _shrink(self, batch: Batch, when: str) -> None:
        """Use smaller pieces than `batch` had from now on."""
        change = shrink(self.state, batch, len(self.student.head))
        log_line(f"warning: CUDA out of memory {when}; retrying with {change}.")
        self.recipe = dataclasses.replace(self.recipe, micro_tokens=self.state.micro_tokens)
        if self.student.device.type == "cuda":
            torch.cuda.empty_cache()

    # Evaluation

    @torch.no_grad()
    def evaluate(self, sample: StepIndices) -> dict[str, float]:
        """Losses and answer metrics of a sample of the examples, with names that start with `eval_`."""
        self.student.model.eval()
        while True:
            batch = self.batch(sample)
            try:
                with self._whole_model():
                    values = self._evaluate_batch(batch, sample)
                break
            except torch.OutOfMemoryError:
                if world_size() > 1:
                    raise
            self._shrink(batch, f"in the evaluation after step {self.state.step}")
        self.train_mode()
        return run_on_main_and_broadcast(lambda: values)  # all ranks decide by the same values

    def _whole_model(self) -> AbstractContextManager[None]:
        """Within this context, each rank has all weights."""
        if self.layer_pass is None or self.layer_pass.shards is None:
            return nullcontext()
        return self.layer_pass.shards.unsharded()

    def _evaluate_batch(self, batch: Batch, sample: StepIndices) -> dict[str, float]:
        """The values of an evaluation."""
        # Losses.
        losses = self._losses(select_hidden(self.student, batch.on_this_rank()[0]), batch)
        values = {
            f"eval_{name}": loss.item() for name, loss in losses.items() if name.endswith(("loss", "forgotten", "kl"))
        }

        # Answers, except those of an anchor, which the student never knew.
        first_of_anchor = len(self.examples.retain) - self.examples.anchor_count
        retained = [i for i in sample[1] if i < first_of_anchor]
        sets = {"forget": (self.examples.forget, sample[0]), "retain": (self.examples.retain, retained)}
        for name, (examples, indices) in sets.items():
            questions = [examples[i] for i in indices if examples[i].prompt_length]
            metrics = answer_metrics(self.student, questions, self.pad_id, self.recipe.micro_tokens)
            values |= {f"eval_{name}_{metric}": value for metric, value in metrics.items()}

        values["eval_quality"] = quality(values)
        return values
