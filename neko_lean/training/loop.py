"""The training loop: which steps are taken, what is saved, and when training ends.

Everything that the next step depends on is in `RunState`, the weights, the optimizer's state and torch's random
generators; the order of the examples follows from the seed. A run that resumes from a save therefore ends in the same
weights as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from neko_lean.checkpoints import (
    METRICS,
    WEIGHTS,
    RunFolder,
    RunState,
    Signals,
    load_weights,
    stored_tensors,
)
from neko_lean.distributed import all_reduce_max, is_main_process
from neko_lean.errors import Interrupted, NekoLeanError, NonFiniteError, PartialStepError
from neko_lean.jsonio import nan_to_null
from neko_lean.models import CausalLM, reset_peak_memory, save_checkpoint
from neko_lean.options import TrainingOptions
from neko_lean.outputs import no_follow
from neko_lean.recipe import Recipe
from neko_lean.terminal import log_line, progress_bar
from neko_lean.training.batch import Batch
from neko_lean.training.checkpointing import Checkpointer
from neko_lean.training.determinism import deterministic
from neko_lean.training.optimizer import InBackwardAdam8bit
from neko_lean.training.prefetch import prefetched
from neko_lean.training.schedules import (
    Phase,
    batches,
    cooldown_steps,
    evaluation_sample,
    is_forgotten,
    is_retained,
    latest_cooldown,
    learning_rate,
    phases,
    skip_steps,
    total_steps,
)
from neko_lean.training.trainer import StepIndices, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Called with the number of a step, and its metrics as in metrics.jsonl.
Callback: TypeAlias = Callable[[int, Mapping[str, Any]], None]

# A batch that was prepared in advance: its indices, the recipe it was made with, and the batch.
PreparedBatch = tuple[StepIndices, Recipe, Batch]


class Loop:
    """One training run.

    Args:
        trainer: takes the steps.
        tokenizer: saved with each checkpoint.
        work: the run's work folder, with saves, the weights at the best evaluation, and metrics.jsonl.
        signals: signals that ask for the end of the run.
        load_original: loads the model as it was at the start of the run, on the CPU.
        options: `seed` and `quiet` are used.
        memory_before: bytes that were in use before the student was loaded; peak memory is what comes on top.

    Raises NekoLeanError if the recipe makes no step of these examples.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        work: RunFolder,
        signals: Signals,
        load_original: Callable[[], CausalLM],
        options: TrainingOptions,
        memory_before: int,
    ) -> None:
        self.trainer, self.tokenizer, self.work, self.signals = trainer, tokenizer, work, signals
        self.checkpointer = Checkpointer(trainer, work, load_original, options, memory_before)
        self.seed, self.quiet = options.seed, options.quiet
        self.device = trainer.student.device

        recipe, examples = trainer.recipe, trainer.examples
        self.lengths = [len(example) for example in examples.forget], [len(example) for example in examples.retain]
        self.steps = total_steps(recipe, *self.lengths, self.seed)
        self.sample: StepIndices = evaluation_sample(recipe, *self.lengths, self.seed)
        self.callbacks: Sequence[Callback] = ()
        self.evaluated: dict[str, float] = {}  # values of the last evaluation
        self.result: tuple[int, Mapping[str, Tensor]] | None = None  # step and final weights, if not the student's

    @property
    def state(self) -> RunState:
        """Where the run stands."""
        return self.trainer.state

    def train(self, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Train, without writing the output (see `write`). The main process calls `callbacks` after each step.

        The output will have the weights after the last step, or those of the best evaluation if the recipe's `choose`
        is not "last". If training stopped early, or a loss or gradient was not finite, it has those of the best
        evaluation anyway, or of the last save if there was no evaluation.

        Returns what run.json tells about the training. `failure` says why training failed, if it did.

        Raises NekoLeanError if a loss or gradient was not finite before anything was saved, and Interrupted, after
        saving, if a signal stopped the run.
        """
        trainer, failure = self.trainer, None
        self.callbacks = callbacks if is_main_process() else ()
        reset_peak_memory(self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), deterministic(trainer.deterministic_on):
            self.checkpointer.restore(self.work.resume_from)
            if trainer.recipe.stop == "forgotten" and not self.state.step:
                self.state.retain_exact = trainer.evaluate(self.sample).get("eval_retain_exact")
            try:
                ended = self._run()
            except NonFiniteError as error:
                failure = ended = str(error)
        self._select_result(failure)
        self._warn_if_unfinished()
        return self._summary(ended, failure)

    def _warn_if_unfinished(self) -> None:
        """With `stop = "forgotten"`, say what the last evaluation found missing."""
        if self.trainer.recipe.stop != "forgotten" or not self.evaluated:
            return
        missing = []
        if not is_forgotten(self.evaluated, exact=self.trainer.unseen_share is not None):
            share = self.evaluated["eval_forgotten"]
            missing.append(f"the forget set forgotten only to {share:.0%} of the level of unseen text")
        if not is_retained(self.evaluated, self.state.retain_exact):
            share = self.evaluated["eval_retain_exact"]
            missing.append(f"{share:.0%} of the retain answers retained, of {self.state.retain_exact:.0%} before")
        if missing:
            log_line(
                f"warning: the last evaluation, up to step {self.state.step}, found {' and '.join(missing)}: raise "
                f"max_steps."
            )

    def _select_result(self, failure: str | None) -> None:
        """Choose the weights of the output."""
        state = self.state
        unfinished = state.step < self.steps and not self._has_cooled_down()
        if (failure or unfinished or self.trainer.recipe.choose != "last") and state.best_step:
            self.result = state.best_step, stored_tensors(self.work.best_weights(state.best_step), WEIGHTS)
        elif failure:
            save = self.work.latest_save()
            if save is not None:
                self.result = save.state.step, save.tensors(WEIGHTS)
            else:
                self.work.unrecoverable = True
                raise NekoLeanError(f"{failure}; nothing was written: lower lr and run again.")

    def _summary(self, ended: str, failure: str | None) -> dict[str, Any]:
        """What run.json tells about the training."""
        state, examples = self.state, self.trainer.examples
        return {
            "recipe": self.trainer.recipe.values(),
            "seed": self.seed,
            "forget_rows": len(examples.forget),
            "retain_rows": len(examples.retain),
            "rows_truncated": sum(example.num_truncated > 0 for example in [*examples.forget, *examples.retain]),
            "steps": state.step,
            "weights_of_step": self.result[0] if self.result else state.step,
            "ended": ended,
            "forgotten_step": state.forgotten_step or None,
            "failure": failure,
            "padding": 1 - state.tokens / max(1, state.positions),
            "wall_seconds": self.checkpointer.seconds(),
            "wait_seconds": state.waited,
            "measured_peak": self.checkpointer.measured_peak(),
            "device": str(self.device),
        }

    def write(self, folder: Path, adapter_of: str | None = None) -> None:
        """Write the final checkpoint and metrics.jsonl to `folder`. Call it after `train`, on all ranks.

        With `adapter_of`, the name of the model that was trained, its adapters are written too.
        """
        if self.result is not None:
            load_weights(self.trainer.trainable, self.result[1])
        save_checkpoint(self.trainer.student, self.tokenizer, folder, adapter_of)
        if is_main_process():
            shutil.copyfile(self.work.metrics, folder / METRICS)

    # Training

    def _run(self) -> str:
        """Train from where `state` stands to the end. Returns why training ended.

        Raises NonFiniteError if a loss or gradient is not finite, and Interrupted after a signal.
        """
        self.trainer.train_mode()
        while True:
            try:
                self._run_phases()
                return self._stopping_reason() or "all steps taken"
            except PartialStepError:
                pass
            # Restore outside of the handler, where the exception no longer keeps the step's tensors alive.
            self.checkpointer.restore(self.work.latest_save(), self.state)

    def _stopping_reason(self) -> str | None:
        """Why training stops before the last step, if it does."""
        state, patience = self.state, self.trainer.recipe.patience
        if self._has_cooled_down():
            return f"forgotten at step {state.forgotten_step}, the learning rate then fell to 0 by step {state.step}"
        if patience and state.best_step and state.worse >= patience:
            return f"early stopping at step {state.step}: no evaluation was better than that of step {state.best_step}"
        return None

    def _has_cooled_down(self) -> bool:
        """Whether the forget set was forgotten, and the steps with a falling learning rate are over."""
        start = self.state.forgotten_step
        return bool(start) and self.state.step >= start + cooldown_steps(start)

    def _run_phases(self) -> None:
        """Run what is left of all phases."""
        rng = random.Random(self.seed)
        label = "unlearn" if self.trainer.examples.forget else "memorize"
        first_step = 0  # steps before the phase
        with (
            open(self.work.metrics, "a", opener=no_follow) as metrics,
            progress_bar(label, self.steps, "steps", self.quiet, self.state.step) as progress,
        ):
            for phase in phases(self.trainer.recipe, *self.lengths, rng):
                # Skip the steps that were taken before, which also restores the random generator.
                done = min(self.state.step - first_step, phase.steps)
                order = skip_steps(batches(self.trainer.recipe, phase, *self.lengths, rng), done, phase)

                if done < phase.steps and not self._stopping_reason():
                    for losses in self._run_phase(phase, order, first_step, metrics):
                        progress.advance(note=f"loss {losses['loss']:.4g}")
                        if self._stopping_reason():
                            return
                first_step += phase.steps

    def _run_phase(
        self, phase: Phase, order: Iterator[StepIndices], first_step: int, metrics: IO[str]
    ) -> Iterator[dict[str, float]]:
        """Run what is left of a phase, with its own optimizer, and yield the losses of each step.

        Args:
            phase: the phase.
            order: indices of the examples of each step that is left.
            first_step: steps before the phase.
            metrics: open metrics.jsonl.
        """
        trainer, recipe, done = self.trainer, self.trainer.recipe, self.state.step - first_step
        optimizer = trainer.new_optimizer(self.seed + first_step)
        if done:
            self.checkpointer.restore_optimizer(optimizer)
        if trainer.layer_pass is None:
            optimizer.attach()

        def prepare() -> PreparedBatch:
            indices, current_recipe = next(order), trainer.recipe
            return indices, current_recipe, trainer.batch(indices)

        try:
            with closing(prefetched(prepare)) as prepared:
                for step in range(done + 1, phase.steps + 1):
                    losses = self._step(
                        optimizer,
                        learning_rate(recipe, step, phase.steps, self.state.forgotten_step),
                        prepared,
                        metrics,
                    )

                    # Save, and stop if any rank has received a signal.
                    signal = all_reduce_max(self.signals.received or 0, self.device)
                    if signal or (self.work.save_every and self.state.step % self.work.save_every == 0):
                        self.checkpointer.save(optimizer)
                    if signal:
                        raise Interrupted(signal, f"after step {self.state.step} of {self.steps}")
                    yield losses
        finally:
            optimizer.close()

    def _step(
        self, optimizer: InBackwardAdam8bit, lr: float, prepared: Iterator[PreparedBatch], metrics: IO[str]
    ) -> dict[str, float]:
        """Take one step, evaluate if it is time to, and write a line of metrics. Returns the step's losses."""
        trainer, state = self.trainer, self.state

        # Wait for the batch. It is made again if CUDA ran out of memory after it had been prepared.
        start = time.monotonic()
        indices, recipe, batch = next(prepared)
        waited = time.monotonic() - start
        if recipe is not trainer.recipe:
            batch = trainer.batch(indices)

        # Train.
        batch, losses = trainer.step(optimizer, lr, indices, batch)
        state.waited += waited
        line: dict[str, Any] = {"step": state.step, **losses, "lr": lr, "rows": batch.rows, "tokens": batch.tokens}
        line["padding"] = 1 - batch.tokens / batch.positions

        # Evaluate.
        if self._is_evaluation_due():
            line |= self._evaluate()

        # Log.
        line["wait_seconds"] = waited
        line["seconds"] = time.monotonic() - start
        line["measured_peak"] = self.checkpointer.measured_peak()
        metrics.write(json.dumps(nan_to_null(line), allow_nan=False) + "\n")
        metrics.flush()
        for callback in self.callbacks:
            callback(state.step, line)
        return losses

    def _is_evaluation_due(self) -> bool:
        """Whether to evaluate after this step: every `eval_every` steps, and where a run with `stop = "forgotten"`
        reaches its limit."""
        recipe, step = self.trainer.recipe, self.state.step
        if not recipe.eval_every:
            return False
        return step % recipe.eval_every == 0 or (recipe.stop == "forgotten" and step == self.steps)

    def _evaluate(self) -> dict[str, float]:
        """Evaluate the fixed sample, and store the weights if it is the best evaluation so far."""
        state = self.state
        values = self.trainer.evaluate(self.sample)
        self.evaluated = values
        if self._is_forgotten():
            state.forgotten_step = state.step
        score = values["eval_quality"] if self.trainer.recipe.choose == "quality" else -values["eval_loss"]
        if math.isfinite(score) and (state.best is None or score > state.best):
            state.best, state.best_step, state.worse = score, state.step, 0
            self.work.save_best(state.step, self.trainer.trainable)
        else:
            state.worse += 1
        return values

    def _is_forgotten(self) -> bool:
        """Whether the last evaluation is the first to find the forget set forgotten and the retain set retained, early
        enough for a cooldown."""
        recipe, state = self.trainer.recipe, self.state
        if recipe.stop != "forgotten" or state.forgotten_step or state.step > latest_cooldown(self.steps):
            return False
        is_exact = self.trainer.unseen_share is not None
        return is_forgotten(self.evaluated, exact=is_exact) and is_retained(self.evaluated, state.retain_exact)
