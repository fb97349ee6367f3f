"""The training loop: which steps there are, what is kept of them, and when they end.

All that the next step depends on is in `RunState`, the weights, the optimizer's state and torch's generators; the order
of the rows follows from the seed. So a run that was cut off goes on from a save and ends in the same weights.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from neko_lean.checkpoints import (
    METRICS,
    RunFolder,
    RunState,
    Save,
    Signals,
    link_tree,
    load_weights,
    random_states,
    set_random_states,
)
from neko_lean.distributed import all_reduce_max, is_main_process
from neko_lean.errors import Interrupted, NekoLeanError, NonFiniteError, PartialStepError
from neko_lean.jsonio import or_null
from neko_lean.models import CausalLM, peak_memory, reset_peak, save_checkpoint
from neko_lean.outputs import MANIFEST, no_follow, write_in_place
from neko_lean.recipes import Recipe
from neko_lean.terminal import log_line, progress_bar
from neko_lean.training.batch import Batch
from neko_lean.training.determinism import deterministic
from neko_lean.training.optimizer import InBackwardAdam8bit
from neko_lean.training.schedules import Phase, after, batches, learning_rate, phases
from neko_lean.training.trainer import Rows, Trainer, prefetched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Loop:
    """One training run. `origin` makes the model as it was when the run began, on the CPU.

    What it writes before the output lies in `work`: saves, the best evaluation's checkpoint, metrics.jsonl.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        work: RunFolder,
        signals: Signals,
        origin: Callable[[], CausalLM],
        quiet: bool,
    ) -> None:
        self.trainer, self.tokenizer, self.seed, self.quiet = trainer, tokenizer, seed, quiet
        self.work, self.signals, self.origin = work, signals, origin
        self.device = trainer.student.device
        rows, recipe = (trainer.forget, trainer.retain), trainer.recipe
        self.lengths = [len(one) for one in rows[0]], [len(one) for one in rows[1]]
        self.steps = sum(phase.steps for phase in phases(recipe, *self.lengths, random.Random(seed)))
        if not self.steps:
            raise NekoLeanError(f"recipe {recipe.name} makes no step of {sum(map(len, self.lengths))} rows.")
        chosen = random.Random(f"{seed} evaluation")
        sample = [chosen.sample(range(len(some)), min(recipe.eval_rows, len(some))) for some in rows]
        self.sample: Rows = sample[0], sample[1]
        self.saved: Save | None = None  # what the run goes on from
        self.began = 0.0  # when it would have begun, had it never been cut off
        self.output: Path | Save | None = None  # whose weights are the result, where it is not the last step's

    @property
    def state(self) -> RunState:
        return self.trainer.state

    def train(self) -> dict[str, Any]:
        """Train; returns what run.json says of the run. `write` then writes the checkpoint.

        The output holds the weights after the last step, or with `choose` other than last those of the best
        evaluation. When early stopping fired, or a loss or gradient stopped being finite, it holds the best
        evaluation's anyway, or where there was none those of the last save; in the second case `failure` says so.

        Raises NekoLeanError when something stopped being finite before there was anything to fall back on, and
        Interrupted, everything saved, when a signal asked for the end of the run.
        """
        device, trainer = self.device, self.trainer
        reset_peak(device)
        failure = None
        with torch.random.fork_rng([device] if device.type == "cuda" else []), deterministic(trainer.deterministic_on):
            self._restore(self.work.found)
            try:
                ended = self._run()
            except NonFiniteError as error:
                failure = ended = str(error)
        state = self.state
        early = state.step < self.steps or trainer.recipe.choose != "last"
        if early and state.best_step:
            self.output = self.work.best(state.best_step)
        elif failure:
            self.output = self.work.newest()
            if self.output is None:
                self.work.unrecoverable = True
                raise NekoLeanError(f"{failure}; nothing was written: lower lr and run again.")
        of_step = self.output.state.step if isinstance(self.output, Save) else state.best_step
        return {
            "recipe": trainer.recipe.values(),
            "seed": self.seed,
            "forget_rows": len(trainer.forget),
            "retain_rows": len(trainer.retain),
            "rows_truncated": sum(one.num_truncated > 0 for one in [*trainer.forget, *trainer.retain]),
            "steps": state.step,
            "weights_of_step": of_step if self.output else state.step,
            "ended": ended,
            "failure": failure,
            "padding": 1 - state.tokens / max(1, state.positions),
            "wall_seconds": time.monotonic() - self.began,
            "wait_seconds": state.waited,
            "peak_memory": self._peak(),
            "device": str(device),
        }

    def write(self, folder: Path) -> None:
        """Write the checkpoint and metrics.jsonl of a run that is over."""
        if isinstance(self.output, Path):
            if is_main_process():
                link_tree(self.output, folder, ignore=[MANIFEST])
        else:
            if self.output is not None:
                load_weights(self.trainer.learning, self.output.tensors("weights"))
            save_checkpoint(self.trainer.student, self.tokenizer, folder)
        if is_main_process():
            shutil.copyfile(self.work.metrics, folder / METRICS)

    def _restore(self, save: Save | None, torn: RunState | None = None) -> None:
        """Stand where a save stands, or without one at the beginning; after a step that left the weights `torn`, with
        the smaller pieces that were chosen then."""
        if save is not None:
            state = save.state
            load_weights(self.trainer.learning, save.tensors("weights"))
            set_random_states(save.tensors("state", "random."), self.device)
            write_in_place(self.work.metrics, (save.folder / METRICS).read_bytes())
        else:
            state = RunState(self.trainer.recipe.micro_tokens)
            if torn is not None:
                load_weights(self.trainer.learning, dict(self.origin().model.named_parameters()))
            torch.manual_seed(self.seed)
            write_in_place(self.work.metrics, b"")
        if torn is not None:
            state.micro_tokens, state.head_chunk = torn.micro_tokens, torn.head_chunk
        if torn is not None or self.work.resume:
            nothing = "" if save else "nothing was saved: "
            log_line(f"{nothing}going on from step {state.step}", self.quiet)
        self.saved, self.began = save, time.monotonic() - state.wall
        self.trainer.load_state(state)

    def _save(self, optimizer: InBackwardAdam8bit) -> None:
        """Write down all that the next step depends on."""
        self.state.wall = time.monotonic() - self.began
        self.state.peak = self._peak()
        tensors = {f"optimizer.{name}": t for name, t in optimizer.state_dict().items()}
        tensors |= {f"random.{name}": t for name, t in random_states(self.device).items()}
        self.work.save(self.state, self.trainer.learning, tensors)

    def _peak(self) -> dict[str, int]:
        """The run's peaks, those before it was cut off among them."""
        now, before = peak_memory(self.device), self.state.peak
        return {key: max(value, before.get(key, 0)) for key, value in now.items()}

    def _ended(self) -> str | None:
        """Why the run is over, if it is."""
        state, patience = self.state, self.trainer.recipe.patience
        if patience and state.best_step and state.worse >= patience:
            return f"early stopping at step {state.step}: none better since step {state.best_step}"
        return None

    def _run(self) -> str:
        """Train on from where `state` stands; returns why it ended.

        Raises NotFinite when a loss or gradient is no number, and Interrupted at a signal.
        """
        self.trainer.ready()
        while True:
            try:
                self._all_phases()
                return self._ended() or "all steps taken"
            except PartialStepError:
                pass
            # Out here, where the exception has let go of the step's tensors.
            self._restore(self.work.newest(), torn=self.state)

    def _all_phases(self) -> None:
        rng = random.Random(self.seed)
        start = 0  # the step that the phase begins after
        label = "unlearn" if self.trainer.forget else "memorize"
        with (
            open(self.work.metrics, "a", opener=no_follow) as metrics,
            progress_bar(label, self.steps, "steps", self.quiet, self.state.step) as progress,
        ):
            for phase in phases(self.trainer.recipe, *self.lengths, rng):
                done = min(self.state.step - start, phase.steps)
                order = after(batches(self.trainer.recipe, phase, *self.lengths, rng), done, phase)
                if done < phase.steps and not self._ended():
                    for losses in self._phase(phase, order, start, metrics):
                        progress.advance(note=f"loss {losses['loss']:.4g}")
                        if self._ended():
                            return
                start += phase.steps

    def _phase(self, phase: Phase, order: Iterator[Rows], start: int, metrics: IO[str]) -> Iterator[dict[str, float]]:
        """Take what is left of a phase that began after step `start`, with an optimizer of its own; gives the losses
        of each step."""
        trainer, recipe, done = self.trainer, self.trainer.recipe, self.state.step - start
        optimizer = InBackwardAdam8bit(
            trainer.learning.items(),
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
            bits=recipe.state_bits,
            offload=recipe.offload_state,
            seed=self.seed + start,
        )
        if done and self.saved is not None:
            optimizer.load_state_dict(self.saved.tensors("state", "optimizer."))
        if trainer.walk is None:
            optimizer.attach()

        def ahead() -> tuple[Rows, Recipe, Batch]:
            rows, made_by = next(order), trainer.recipe
            return rows, made_by, trainer.batch(rows)

        try:
            with closing(prefetched(ahead)) as prepared:
                for step in range(done + 1, phase.steps + 1):
                    losses = self._step(optimizer, learning_rate(recipe, step, phase.steps), prepared, metrics)
                    asked = all_reduce_max(self.signals.received or 0, self.device)
                    if asked or (self.work.save_every and self.state.step % self.work.save_every == 0):
                        self._save(optimizer)
                    if asked:
                        raise Interrupted(asked, f"after step {self.state.step} of {self.steps}")
                    yield losses
        finally:
            optimizer.close()

    def _step(
        self,
        optimizer: InBackwardAdam8bit,
        lr: float,
        prepared: Iterator[tuple[Rows, Recipe, Batch]],
        metrics: IO[str],
    ) -> dict[str, float]:
        trainer, state, start = self.trainer, self.state, time.monotonic()
        rows, made_by, batch = next(prepared)
        waited = time.monotonic() - start
        if made_by is not trainer.recipe:  # before the GPU's memory ran out
            batch = trainer.batch(rows)
        batch, values = trainer.step(optimizer, lr, rows, batch)
        state.waited += waited
        line: dict[str, Any] = {"step": state.step, **values, "lr": lr, "rows": batch.rows, "tokens": batch.tokens}
        line["padding"] = 1 - batch.tokens / batch.positions
        if trainer.recipe.eval_every and state.step % trainer.recipe.eval_every == 0:
            line |= self._evaluate()
        line["wait_seconds"] = waited
        line["seconds"] = time.monotonic() - start
        line["peak_memory"] = peak_memory(self.device)
        metrics.write(json.dumps(or_null(line), allow_nan=False) + "\n")
        metrics.flush()
        return values

    def _evaluate(self) -> dict[str, float]:
        """Look at the fixed sample; the best so far by the recipe's rule is kept to fall back on."""
        state = self.state
        values = self.trainer.evaluate(self.sample)
        merit = values["eval_quality"] if self.trainer.recipe.choose == "quality" else -values["eval_loss"]
        if math.isfinite(merit) and (state.best is None or merit > state.best):
            state.best, state.best_step, state.worse = merit, state.step, 0
            self.work.keep_best(state.step, self.trainer.student, self.tokenizer)
        else:
            state.worse += 1
        return values
