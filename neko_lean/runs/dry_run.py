"""A dry run of `unlearn` or `memorize`: the steps and the memory of a training run, without the student."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neko_lean.cache import TeacherCache
from neko_lean.data import EncodedExample, Example
from neko_lean.distributed import world_size
from neko_lean.errors import NekoLeanError
from neko_lean.memory import predict
from neko_lean.outputs import Output
from neko_lean.recipe import Recipe, substitutes_retain_answers
from neko_lean.runs.examples import PreparedExamples, training_examples
from neko_lean.training import TrainingExamples, batches, make_batch, micro_batches, phases, total_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def planned_examples(
    prepared: PreparedExamples,
    recipe: Recipe,
    teacher: TeacherCache | None,
    base_cache: TeacherCache | None,
    tokenizer: PreTrainedTokenizerBase,
    self_generates: bool,
) -> TrainingExamples:
    """What an unlearning run would train on.

    Rows that the model has yet to write are counted at the maximum length, and so are their answers as substitutes.
    The arguments are those of `training_examples`, and whether the model has yet to write the retain set.
    """
    if prepared.anchor and teacher is None and base_cache is None:  # the run would cache the anchor's losses itself
        examples = TrainingExamples(prepared.forget, prepared.retain, prepared.substitutes)
    else:
        examples = training_examples(prepared, recipe, teacher, base_cache, tokenizer)
    if not self_generates:
        return examples

    row = EncodedExample(Example("self-generated", "", "", ""), [0] * prepared.max_length, 0, 0)
    retain = [*examples.retain, *[row] * recipe.self_generated] if recipe.retain is not None else []
    substitutes = [row] * len(examples.forget) if substitutes_retain_answers(recipe) else examples.substitutes
    return TrainingExamples(examples.forget, retain, substitutes)


def plan_training(
    folder: Path,
    output: Output,
    examples: TrainingExamples,
    recipe: Recipe,
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """What a training run would do.

    Args:
        folder: the model's; only its config is read.
        output: where the run would write.
        examples: what it would train on.
        recipe, device, seed: of the run.

    Returns:
        `dry_run` (true), `out`, `replaces` (whether something is there), `recipe`, `device`, `forget_rows`,
        `retain_rows`, `rows_truncated`, `steps`, `largest_step` (rows and tokens of each micro-batch) and
        `predicted_peak` (bytes; None if the model's own code does not run on fake tensors).

    Raises:
        NekoLeanError: the recipe makes no step of these examples.
    """
    lengths = [len(example) for example in examples.forget], [len(example) for example in examples.retain]
    steps = total_steps(recipe, *lengths, seed)
    forget_indices, retain_indices = _largest_step(examples, recipe, seed)
    batch = make_batch(
        [examples.forget[i] for i in forget_indices] if recipe.forget is not None else [],
        [examples.retain[i] for i in retain_indices],
        None,  # what the cache holds does not change the shapes
        recipe,
        0,  # padding
        torch.device("cpu"),
        [examples.substitutes[i] for i in forget_indices] if examples.substitutes else [],
    )
    micro, _ = batch.on_this_rank()
    shapes = [(ids.shape[0], ids.shape[1]) for ids in micro.input_ids]
    return {
        "dry_run": True,
        "out": str(output.path),
        "replaces": output.path.exists(),
        "recipe": recipe.values(),
        "device": str(device),
        "forget_rows": len(examples.forget),
        "retain_rows": len(examples.retain),
        "rows_truncated": sum(example.num_truncated > 0 for example in [*examples.forget, *examples.retain]),
        "steps": steps,
        "largest_step": [list(shape) for shape in shapes],
        "predicted_peak": _predicted_peak(folder, recipe, shapes, [len(index) for index in micro.index], device),
    }


def _largest_step(examples: TrainingExamples, recipe: Recipe, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the forget and retain examples of the step with the most positions, padding included."""
    forget, retain = [len(example) for example in examples.forget], [len(example) for example in examples.retain]
    substitutes = [len(example) for example in examples.substitutes]
    rng = random.Random(seed)

    def num_positions(step: tuple[list[int], list[int]]) -> int:
        lengths = [retain[i] for i in step[1]]
        for own in (forget if recipe.forget is not None else [], substitutes):
            lengths += [own[i] for i in step[0]] if own else []
        groups = micro_batches(lengths, recipe.micro_tokens)
        return sum(len(group) * max(lengths[i] for i in group) for group in groups)

    # Steps are drawn in the order of training; after each phase one more is, see `skip_steps`.
    steps: list[tuple[list[int], list[int]]] = []
    for phase in phases(recipe, forget, retain, rng):
        order = batches(recipe, phase, forget, retain, rng)
        steps += islice(order, phase.steps)
        next(order)
    return max(steps, key=num_positions)


def _predicted_peak(
    folder: Path,
    recipe: Recipe,
    shapes: Sequence[tuple[int, int]],
    head_positions: Sequence[int],
    device: torch.device,
) -> int | None:
    """Peak bytes of a step. As in training, the backward pass is checkpointed if the layers cannot run one by one."""
    try:
        return predict(folder, recipe, shapes, head_positions, world_size()).peak_on(device)
    except NekoLeanError:
        if recipe.backward != "layerwise" or world_size() > 1:
            raise
        checkpointed = dataclasses.replace(recipe, backward="checkpointed", offload_activations=False)
        return _predicted_peak(folder, checkpointed, shapes, head_positions, device)
    except Exception:  # raised by the model's own code, which may still run on real tensors
        return None
