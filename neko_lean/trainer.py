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
from neko_lean.data import Encoded
from neko_lean.errors import NekoLeanError
from neko_lean.evaluation import answers, quality
from neko_lean.layerwise import LayerPass, decoder_layers, freeze
from neko_lean.memory import peak_memory, predict, reset_peak
from neko_lean.modeling import CausalLM, checkpoint_activations
from neko_lean.optim import InBackwardAdam8bit
from neko_lean.progress import bar, say
from neko_lean.recipes import Recipe
from neko_lean.schedules import Phase, batches, learning_rate, phases
from neko_lean.step import Batch, batch_losses, chosen_hidden, make_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS = "metrics.jsonl"
LATELY = 0.9  # how much of the anchor's last losses a step keeps
SETS = ("forget", "retain")
T = TypeVar("T")


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
    freeze(student, recipe.train_last, recipe.train_only)
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
        substitutes: list[Encoded] | None = None,
    ) -> None:
        self.student, self.tokenizer, self.seed, self.quiet = student, tokenizer, seed, quiet
        self.recipe, self.walk = _way_back(student, recipe)
        recipe = self.recipe
        self.forget, self.retain, self.teacher, self.stage = forget, retain, teacher, stage
        self.substitutes = substitutes
        self.lengths = [len(one) for one in forget], [len(one) for one in retain]
        self.rng = random.Random(seed)
        self.phases = phases(recipe, *self.lengths, self.rng)
        self.steps = sum(phase.steps for phase in self.phases)
        sample = random.Random(f"{seed} evaluation")
        self.sample = tuple(
            sample.sample(range(len(rows)), min(recipe.eval_rows, len(rows))) for rows in (forget, retain)
        )
        self.best: float | None = None
        self.best_step = 0
        self.worse = 0  # evaluations since the best
        self.steps_done = 0
        self.unseen = [0.0, 0.0]  # the student's and the teacher's losses on the anchor's tokens, lately
        self.positions = self.tokens = 0
        self.waited = 0.0  # seconds that steps stood still for their batch
        self.largest: Batch | None = None  # the step with the most positions

    def _batch(self, forget: Sequence[int], retain: Sequence[int]) -> Batch:
        """The batch of these rows, by number."""
        pad_id = int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        rows = [self.forget[i] for i in forget] if self.recipe.forget_objective != "none" else []
        held = [self.retain[i] for i in retain]
        others = [self.substitutes[i] for i in forget] if self.substitutes else []
        return make_batch(rows, held, self.teacher, self.recipe, pad_id, self.student.device, others)

    def train(self) -> dict[str, Any]:
        """Train, and leave the output checkpoint in the stage folder; returns what run.json says of the run.

        The output holds the weights after the last step, or with `choose` other than last those of the best
        evaluation. When early stopping fired, or the loss stopped being finite, it holds the best evaluation's anyway;
        in the second case `failure` says so. Raises NekoLeanError when the loss stopped being finite before there was
        an evaluation to fall back on.
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
        early = self.steps_done < self.steps or (self.recipe.choose != "last" and self.best_step > 0)
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
        if recipe.backward == "checkpointed":
            checkpoint_activations(self.student.model)
        self._ready()
        label = "memorize" if not self.forget else "unlearn"
        with (
            (self.stage / METRICS).open("w") as metrics,
            bar(label, self.steps, "steps", self.quiet) as progress,
        ):
            for phase in self.phases:
                for losses in self._phase(phase, metrics):
                    progress.advance(note=f"loss {losses['loss']:.4g}")
                    if recipe.patience and self.best_step and self.worse >= recipe.patience:
                        return f"early stopping at step {self.steps_done}: none better since step {self.best_step}"
        return "all steps taken"

    def _phase(self, phase: Phase, metrics: IO[str]) -> Iterator[dict[str, float]]:
        """Take a phase's steps, with an optimizer of its own; gives the losses of each."""
        recipe = self.recipe
        optimizer = InBackwardAdam8bit(
            self.student.model.named_parameters(),
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
            bits=recipe.state_bits,
            offload=recipe.offload_state,
            seed=self.seed + self.steps_done,
        )
        if self.walk is None:
            optimizer.attach()
        steps = batches(recipe, phase, *self.lengths, self.rng)
        try:
            with closing(prefetched(lambda: self._batch(*next(steps)))) as prepared:
                for step in range(1, phase.steps + 1):
                    yield self._step(optimizer, learning_rate(recipe, step, phase.steps), prepared, metrics)
        finally:
            optimizer.close()

    def _ready(self) -> None:
        """Dropout only where a layer runs once a step, or where checkpointing restores its random numbers."""
        self.student.model.train(self.walk is None)

    def _step(
        self, optimizer: InBackwardAdam8bit, lr: float, batches: Iterator[Batch], metrics: IO[str]
    ) -> dict[str, float]:
        step = self.steps_done + 1
        start = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - start
        self.waited += waited
        if self.walk is None:
            hidden = chosen_hidden(self.student, batch.micro, batch.index)
        else:
            hidden = self.walk.forward(batch.micro, batch.index)
        losses = batch_losses(hidden, self.student.head, batch, self.recipe, self._drift())
        values = {name: loss.item() for name, loss in losses.items()}
        del hidden
        if "anchor_nll" in values:
            now = values.pop("anchor_nll"), values.pop("anchor_teacher_nll")
            self.unseen = [LATELY * old + new for old, new in zip(self.unseen, now, strict=True)]
            values["drift"] = self._drift()
        if not math.isfinite(values["loss"]):
            raise NotFinite(f"the loss became {values['loss']} at step {step}, before its update")
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

    def _drift(self) -> float:
        """What unseen text costs the student now, as a multiple of what it cost the teacher: forgotten text is to cost
        as much as it, so that the levels follow."""
        student, teacher = self.unseen
        return student / teacher if teacher > 0 else 1.0

    @torch.no_grad()
    def _evaluate(self, step: int) -> dict[str, float]:
        """Losses and answers of the fixed sample; the best so far by the recipe's rule is kept to fall back on."""
        self.student.model.eval()
        batch = self._batch(*self.sample)
        hidden = chosen_hidden(self.student, batch.micro, batch.index)
        losses = batch_losses(hidden, self.student.head, batch, self.recipe, self._drift())
        losses = {name: loss for name, loss in losses.items() if name.endswith("loss")}
        values = {f"eval_{name}": loss.item() for name, loss in losses.items()}
        if self.recipe.retain_objective == "kl":
            values["eval_retain_kl"] = values["eval_retain_loss"]
        for name, rows, chosen in zip(SETS, (self.forget, self.retain), self.sample, strict=True):
            # An anchor's documents have no prompt, so all of them would be answer.
            asked = [rows[i] for i in chosen if rows[i].prompt]
            found = answers(self.student, asked, int(self.tokenizer.pad_token_id))  # type: ignore[arg-type]
            values |= {f"eval_{name}_{key}": value for key, value in found.items()}
        values["eval_quality"] = quality(values)
        self._ready()
        merit = values["eval_quality"] if self.recipe.choose == "quality" else -values["eval_loss"]
        if math.isfinite(merit) and (self.best is None or merit > self.best):
            self.best, self.best_step, self.worse = merit, step, 0
            self._save(self.stage / "best")
        else:
            self.worse += 1
        return values

    def _save(self, folder: Path) -> None:
        """Write model and tokenizer as a Hugging Face checkpoint."""
        self.student.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
