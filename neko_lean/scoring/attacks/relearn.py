"""The relearning attack: a few training steps on some forget documents, which may bring back the others.

Knowledge that was only hidden shows in the loss of the true answers before the model generates them, so each point has
that loss, too. Compare it with that of a model that never saw them.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from neko_lean.data import Example
from neko_lean.distributed import as_single_process, is_main_process, run_on_main_and_broadcast
from neko_lean.errors import NekoLeanError
from neko_lean.models import CausalLM
from neko_lean.options import ScoreSettings, TrainingOptions
from neko_lean.recipe import load_recipe
from neko_lean.runs import memorize
from neko_lean.scoring.attacks.answers import baseline_point, point
from neko_lean.scoring.attacks.registry import AttackTarget, Curve, attack
from neko_lean.scoring.measure import encode_answers
from neko_lean.scoring.score_folder import writing
from neko_lean.scoring.uncertainty import mean_by_document
from neko_lean.scoring.views import view_answers

STEPS = (5, 10, 20, 40)  # after which the model is scored
MIN_EXAMPLES = 16  # to train on, in whole documents: other examples of the same document would not be unseen
MAX_EXAMPLES = 64  # to train on, because each step takes all; the rest of their documents is not scored either
DEFAULT_LR = 1e-4


@attack(
    "relearn",
    title="Relearning",
    x_key="steps",
    x_label="training steps on a few forget rows",
    reloads_model=True,
    options=("relearn_lr", "seed"),
)
def relearn(target: AttackTarget) -> Curve:
    """Train on some documents of the forget set, and score the examples of the others after each number of STEPS.

    The main process trains, and all ranks read the checkpoints from a temporary folder in the stage.
    """
    lr, seed = target.settings.relearn_lr, target.settings.seed or 0
    trained, scored = split_documents(target.examples, seed)
    if not scored:
        raise NekoLeanError(
            f"--attack relearn needs more forget rows than the {len(trained)} that it trains on; leave it out or score "
            f"a larger forget set."
        )

    lm = target.load(target.folder)
    losses = answer_losses(lm, target, scored)
    del lm  # before the training
    curve = [{"steps": 0, "rows": len(trained), **baseline_point(scored, target.baseline), **losses}]
    work = target.stage / "relearn"
    try:
        rows = [example.row for example in trained]
        checkpoint, done = target.folder, 0
        for steps in STEPS:
            overrides = _overrides(steps - done, DEFAULT_LR if lr is None else lr, len(trained), target.settings)
            out = work / f"steps-{steps}"
            train = partial(_train, checkpoint, rows, out, overrides, seed, target.device)
            run_on_main_and_broadcast(writing(target.stage, train))
            checkpoint, done = out, steps

            lm = target.load(checkpoint)
            after = point(scored, target.generate(lm, scored, f"{steps} steps"))
            curve.append({"steps": steps, "rows": len(trained), **after, **answer_losses(lm, target, scored)})
            del lm  # before the next training
    finally:
        if is_main_process():
            shutil.rmtree(work, ignore_errors=True)
    return curve


def answer_losses(lm: CausalLM, target: AttackTarget, examples: Sequence[Example]) -> dict[str, Any]:
    """Mean loss of the examples' answers in nats a token, each answer with the same weight, and its interval.

    Each token is predicted from the prompt, in the score's format, and the true tokens before it. Prompts that do not
    fit are shortened at their start, and answers without tokens are left out.
    """
    encoded = encode_answers(lm, target.tokenizer, examples, target.generate.prompt_format)
    encoded = [example for example in encoded if example.answer_length]
    losses = [float(-answer.logp.mean()) for answer in view_answers(lm, target.tokenizer, encoded)]
    mean = mean_by_document([example.example for example in encoded], losses)
    return {"answer_nll": mean["mean"], "answer_nll_interval": mean["interval"]}


def split_documents(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Divide examples by document, at random, into those to train on and those to score."""
    names = sorted({example.document for example in examples})
    random.Random(f"{seed} relearn").shuffle(names)
    trained: list[Example] = []
    while names and len(trained) < MIN_EXAMPLES:
        name = names.pop()
        trained += [example for example in examples if example.document == name]
    remaining = set(names)
    return trained[:MAX_EXAMPLES], [example for example in examples if example.document in remaining]


def _overrides(steps: int, lr: float, count: int, settings: ScoreSettings) -> dict[str, Any]:
    """Changes to the recipe `memorize`: every step takes all examples, however long they are, in the score's format."""
    return {
        "format": settings.format,
        "system": settings.system,
        "max_steps": steps,
        "lr": lr,
        "schedule": "constant",
        "warmup": 0.0,
        "retain_rows": count,
        "batch_tokens": count * load_recipe("memorize").max_length,
    }


def _train(
    model: Path, data: list[dict[str, Any]], out: Path, overrides: Mapping[str, Any], seed: int, device: str | None
) -> None:
    with as_single_process():  # the other ranks wait
        run = TrainingOptions(seed=seed, device=device, quiet=True)
        memorize(model, out, data=data, overrides=overrides, run=run)
