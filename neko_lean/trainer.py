"""The training loop: schedule, in-backward steps, evaluation, early stopping, logs, the output checkpoint.

It trains whatever `step.batch_losses` gives and knows neither commands nor files but those of its stage folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch

from neko_lean.cache import TeacherCache
from neko_lean.data import Encoded, length_batches, paired_batches
from neko_lean.errors import NekoLeanError
from neko_lean.layerwise import LayerPass, decoder_layers, freeze_below
from neko_lean.memory import peak_memory, predict, reset_peak
from neko_lean.modeling import CausalLM, checkpoint_activations
from neko_lean.optim import InBackwardAdam8bit
from neko_lean.progress import bar, say
from neko_lean.recipes import Recipe
from neko_lean.step import Batch, batch_losses, chosen_hidden, make_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS = "metrics.jsonl"
T = TypeVar("T")


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate of step 1..steps: a linear rise over the warm-up, then constant or linear to 0."""
    done = (step - 1) / steps
    if done < recipe.warmup:
        return recipe.lr * step / (recipe.warmup * steps)
    return recipe.lr if recipe.schedule == "constant" else recipe.lr * (1 - done) / (1 - recipe.warmup)


def prefetched(make: Callable[[], T]) -> Iterator[T]:
    """What `make` returns, again and again, each made in a thread of its own while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make)
        while True:
            one = coming.result()
            coming = pool.submit(make)
            yield one


def _way_back(student: CausalLM, recipe: Recipe) -> tuple[Recipe, LayerPass | None]:
    """How this model's backward pass will go: the recipe's way, or checkpointed where its layers cannot be walked."""
    if recipe.train_last:
        freeze_below(student, decoder_layers(student), recipe.train_last)
    if recipe.backward == "layerwise":
        try:
            return recipe, LayerPass(student, decoder_layers(student), offload=recipe.offload_activations)
        except NekoLeanError as error:
            say(
                f"warning: {error} Going on with backward=checkpointed, in which a layer's activations are alive for a "
                f"step's {recipe.batch_tokens} positions at once instead of {recipe.micro_tokens}."
            )
            recipe = dataclasses.replace(recipe, backward="checkpointed", offload_activations=False)
    return recipe, None


class NotFinite(Exception):
    """The loss of the step about to be taken is no number; the weights are as the step before left them."""


class Trainer:
    """One training run: its model, data and state, and the checkpoint of its best evaluation in the stage folder."""

    def __init__(
        self,
        student: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        forget: list[Encoded],
        retain: list[Encoded],
        teacher: TeacherCache | None,
        recipe: Recipe,
        seed: int,
        stage: Path,
        quiet: bool,
    ) -> None:
        self.student, self.tokenizer, self.seed, self.quiet = student, tokenizer, seed, quiet
        self.recipe, self.walk = _way_back(student, recipe)
        recipe = self.recipe
        self.forget, self.retain, self.teacher, self.stage = forget, retain, teacher, stage
        rng = random.Random(seed)
        self.batches = paired_batches(
            [len(one) for one in forget],
            [len(one) for one in retain],
            forget_rows=recipe.forget_rows,
            retain_rows=recipe.retain_rows,
            max_tokens=recipe.batch_tokens,
            rng=rng,
        )
        self.steps = recipe.max_steps or max(1, math.ceil(recipe.epochs * self._steps_of_epoch()))
        sample = random.Random(f"{seed} evaluation")
        self.sample = tuple(
            sample.sample(rows, min(recipe.eval_rows, len(rows))) if rows else [] for rows in (forget, retain)
        )
        self.best: float | None = None
        self.best_step = 0
        self.worse = 0  # evaluations since the best
        self.steps_done = 0
        self.positions = self.tokens = 0
        self.waited = 0.0  # seconds that steps stood still for their batch
        self.largest: Batch | None = None  # the step with the most positions

    def _steps_of_epoch(self) -> int:
        sizes = []
        for rows, most in ((self.forget, self.recipe.forget_rows), (self.retain, self.recipe.retain_rows)):
            lengths = [len(one) for one in rows]
            sizes.append(len(length_batches(lengths, max_rows=most, max_tokens=self.recipe.batch_tokens)))
        return max(sizes)

    def _batch(self, forget: Sequence[Encoded], retain: Sequence[Encoded]) -> Batch:
        pad_id = int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        return make_batch(forget, retain, self.teacher, self.recipe, pad_id, self.student.device)

    def train(self) -> dict[str, Any]:
        """Train, and leave the output checkpoint in the stage folder; returns what run.json says of the run.

        The output holds the weights after the last step. When early stopping fired, or the loss stopped being finite,
        it holds those of the best evaluation; in the second case `failure` says so. Raises NekoLeanError when the loss
        stopped being finite before there was an evaluation to fall back on.
        """
        reset_peak(self.student.device)
        start = time.monotonic()
        failure = None
        best = self.stage / "best"
        try:
            ended = self._run()
        except NotFinite as error:
            failure = ended = str(error)
            if not self.best_step:
                raise NekoLeanError(f"{error}; nothing was written: lower lr and run again.") from error
        early = self.steps_done < self.steps
        if early:
            for file in best.iterdir():
                file.rename(self.stage / file.name)
        else:
            self._save(self.stage)
        shutil.rmtree(best, ignore_errors=True)
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "forget_rows": len(self.forget),
            "retain_rows": len(self.retain),
            "rows_truncated": sum(one.cut > 0 for one in [*self.forget, *self.retain]),
            "steps": self.steps_done,
            "weights_of_step": self.best_step if early else self.steps_done,
            "ended": ended,
            "failure": failure,
            "padding": 1 - self.tokens / max(1, self.positions),
            "wall_seconds": time.monotonic() - start,
            "wait_seconds": self.waited,
            "peak_memory": peak_memory(self.student.device),
            "predicted_peak": self._predicted(),
            "device": str(self.student.device),
        }

    def _predicted(self) -> int | None:
        """Bytes that the largest step was to need by `memory.predict`."""
        if self.largest is None:
            return None
        shapes = [(ids.shape[0], ids.shape[1]) for ids in self.largest.micro]
        wanted = [len(index) for index in self.largest.index]
        try:
            need = predict(self.student.model.config, self.recipe, shapes, wanted)
        except Exception:  # of the model's own code on fake tensors: it must not cost a finished run
            return None
        return need.on(self.student.device)

    def _run(self) -> str:
        """Train; returns why it ended. Raises NotFinite before a step whose loss is no number."""
        recipe = self.recipe
        optimizer = InBackwardAdam8bit(
            self.student.model.named_parameters(),
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
            bits=recipe.state_bits,
            offload=recipe.offload_state,
            seed=self.seed,
        )
        if recipe.backward == "checkpointed":
            checkpoint_activations(self.student.model)
        self._ready()
        if self.walk is None:
            optimizer.attach()
        label = "memorize" if recipe.retain_objective == "ce" else "unlearn"
        try:
            with (
                (self.stage / METRICS).open("w") as metrics,
                bar(label, self.steps, "steps", self.quiet) as progress,
                closing(prefetched(self._next_batch)) as batches,
            ):
                for step in range(1, self.steps + 1):
                    losses = self._step(optimizer, step, batches, metrics)
                    progress.advance(note=f"loss {losses['loss']:.4g}")
                    if recipe.patience and self.best_step and self.worse >= recipe.patience:
                        return f"early stopping at step {step}: no lower total loss since step {self.best_step}"
        finally:
            optimizer.close()
        return "all steps taken"

    def _ready(self) -> None:
        """Dropout only where a layer runs once a step, or where checkpointing restores its random numbers."""
        self.student.model.train(self.walk is None)

    def _next_batch(self) -> Batch:
        forget_index, retain_index = next(self.batches)
        return self._batch([self.forget[i] for i in forget_index], [self.retain[i] for i in retain_index])

    def _step(
        self, optimizer: InBackwardAdam8bit, step: int, batches: Iterator[Batch], metrics: IO[str]
    ) -> dict[str, float]:
        start = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - start
        self.waited += waited
        if self.walk is None:
            hidden = chosen_hidden(self.student, batch.micro, batch.index)
        else:
            hidden = self.walk.forward(batch.micro, batch.index)
        losses = batch_losses(hidden, self.student.head, batch, self.recipe)
        values = {name: loss.item() for name, loss in losses.items()}
        del hidden
        if not math.isfinite(values["loss"]):
            raise NotFinite(f"the loss became {values['loss']} at step {step}, before its update")
        lr = learning_rate(self.recipe, step, self.steps)
        optimizer.begin_step(lr)
        losses["loss"].backward()
        if self.walk is not None:
            self.walk.backward(optimizer.update)
        self.steps_done = step
        if self.largest is None or batch.positions > self.largest.positions:
            self.largest = batch
        self.positions += batch.positions
        self.tokens += batch.tokens
        line: dict[str, Any] = {"step": step, **values, "lr": lr, "rows": batch.rows, "tokens": batch.tokens}
        line["padding"] = 1 - batch.tokens / batch.positions
        if self.recipe.eval_every and step % self.recipe.eval_every == 0:
            line |= self._evaluate(step)
        line["wait_seconds"] = waited
        line["seconds"] = time.monotonic() - start
        line["peak_memory"] = peak_memory(self.student.device)
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()
        return values

    @torch.no_grad()
    def _evaluate(self, step: int) -> dict[str, float]:
        """The losses on the fixed sample; a new lowest total becomes the checkpoint to fall back on."""
        self.student.model.eval()
        batch = self._batch(*self.sample)
        hidden = chosen_hidden(self.student, batch.micro, batch.index)
        losses = batch_losses(hidden, self.student.head, batch, self.recipe)
        self._ready()
        values = {f"eval_{name}": loss.item() for name, loss in losses.items()}
        total = values["eval_loss"]
        if math.isfinite(total) and (self.best is None or total < self.best):
            self.best, self.best_step, self.worse = total, step, 0
            self._save(self.stage / "best")
        else:
            self.worse += 1
        return values

    def _save(self, folder: Path) -> None:
        """Write model and tokenizer as a Hugging Face checkpoint."""
        self.student.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
