"""What `unlearn` and `memorize` share: the identity of a run, its work folder, training, and the output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neko_lean.cache import TeacherCache
from neko_lean.checkpoints import RunFolder, Signals, digests, finished_run, handle_signals, open_run_folder, versions
from neko_lean.data import RowSource, paths_among, require_hub_package
from neko_lean.distributed import all_gather_objects, is_main_process, world_size
from neko_lean.errors import NekoLeanError
from neko_lean.extras import require_extra
from neko_lean.jsonio import nan_to_null
from neko_lean.memory import predicted_peak
from neko_lean.memory.fake_models import fake_model
from neko_lean.memory.fake_tensors import fake_tensors
from neko_lean.models import (
    CausalLM,
    Model,
    check_sharding,
    memory_in_use,
    model_folder,
    pick_dtype,
    trim_memory,
    warn_emulated_bfloat16,
)
from neko_lean.options import TrainingOptions
from neko_lean.outputs import RUN, Output, claim_folder, explained_write_errors, write_atomically
from neko_lean.recipe import Recipe
from neko_lean.runs.trackers import tracked
from neko_lean.terminal import log_line
from neko_lean.training import (
    Callback,
    Loop,
    Trainer,
    TrainingExamples,
    explained_out_of_memory,
    freeze,
    prepare_student,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def identity_of(
    command: str, recipe: Recipe, seed: int, device: torch.device, parts: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes a run the same run: everything that determines its final weights. `parts` are the command's own."""
    identity: dict[str, Any] = {"command": command, "recipe": recipe.values(), "seed": seed, "device": device.type}
    if world_size() > 1:
        identity["ranks"] = world_size()
    return {**identity, **parts}


def finished_before(output: Output, identity: Mapping[str, Any], options: TrainingOptions) -> dict[str, Any] | None:
    """What run.json says if `--resume` finds this very run complete; None otherwise."""
    run = finished_run(output, identity, dry_run=options.dry_run) if options.resume else None
    if run is not None:
        log_line(f"{output.path} is complete: nothing to do.", options.quiet)
        raise_failure(run, output.path)
    return run


def claim_before_download(
    out: str | Path, model: Model, inputs: Sequence[str | Path | None], options: TrainingOptions
) -> tuple[Output, Path]:
    """Claim the output folder, then find the model's folder, which may download it from the hub.

    Returns:
        The output and the model's folder.
    """
    claim = partial(claim_folder, out, "saved", overwrite=options.overwrite, resume=options.resume)
    claim([*paths_among(model), *inputs])
    folder = model_folder(model)
    return claim([folder, *inputs]), folder


def check_extras(recipe: Recipe, options: TrainingOptions, *sources: RowSource | None) -> None:
    """Raise NekoLeanError if a recipe, or a data set on the hub, needs an optional package that is not installed, if
    several ranks need a newer torch, or if adapters are to be saved and the recipe trains none."""
    if options.save_adapter and not recipe.lora_rank:
        raise NekoLeanError(
            "--save-adapter has no effect without --lora-rank, because only a run with adapters has one; leave it out."
        )
    if world_size() > 1:
        check_sharding()
    if recipe.state_bits == 4:
        require_extra("torchao", "torchao", f"recipe {recipe.name}: state_bits = 4")
    if recipe.lora_rank:
        require_extra("peft", "lora", f"recipe {recipe.name}: lora_rank = {recipe.lora_rank}")
    require_hub_package(*sources)


def check_trained_layers(folder: Path, recipe: Recipe) -> None:
    """Raise NekoLeanError if the model has no parameters that a recipe is to train, before the teacher is cached."""
    if not recipe.train_last and not recipe.train_only and not recipe.lora_rank:
        return
    try:
        with fake_tensors():
            student = fake_model(folder, pick_dtype(recipe.dtype))
            prepare_student(student, recipe, torch.device("cpu"))
            freeze(student, recipe.train_last, recipe.train_only)
    except NekoLeanError:
        raise
    except Exception:  # raised by the model's own code, which may still run on real tensors
        return


@contextmanager
def work_folder(
    output: Output, identity: dict[str, Any], options: TrainingOptions
) -> Iterator[tuple[RunFolder, Signals]]:
    """The run's work folder and its signals, with errors of the disk and of a full GPU explained."""
    with (
        handle_signals() as signals,
        open_run_folder(output, identity, save_every=options.save_every, resume=options.resume) as work,
        explained_write_errors(output.path),
        explained_out_of_memory(),
    ):
        yield work, signals


@dataclass(frozen=True)
class TrainingJob:
    """What one training run consists of, apart from its work folder."""

    make_student: Callable[[torch.device], CausalLM]  # loads or creates the student as it is when the run starts
    tokenizer: PreTrainedTokenizerBase
    examples: TrainingExamples
    teacher: TeacherCache | None
    recipe: Recipe
    device: torch.device
    options: TrainingOptions
    base: str  # the model as the user named it
    callback: Callback | None = None  # called with each step and its metrics
    base_cache: TeacherCache | None = None  # of the model before it learned the forget set


def train(job: TrainingJob, work: RunFolder, signals: Signals, about: Mapping[str, Any]) -> dict[str, Any]:
    """Load the student, train it, and write the output folder.

    Args:
        job: what to train on what.
        work: the run's work folder.
        signals: the signals that stop it.
        about: entries of run.json that only the command knows.

    Returns:
        The contents of run.json.
    """
    trim_memory()
    memory_before = memory_in_use(job.device)
    warn_emulated_bfloat16(job.recipe.dtype, job.device, job.options.quiet)

    # Ranks shard a student that is whole in host memory, and layers are quantised on their way to the device.
    recipe = job.recipe
    in_host_memory = world_size() > 1 or recipe.quantize_base != "none"

    def make_student(device: torch.device) -> CausalLM:
        loaded = job.make_student(torch.device("cpu") if in_host_memory else device)
        prepare_student(loaded, recipe, device, job.options.seed)
        return loaded

    student = make_student(job.device if world_size() == 1 else torch.device("cpu"))
    if job.teacher is not None:
        job.teacher.check_vocabulary(len(student.head))
    if job.base_cache is not None:
        job.base_cache.check_vocabulary(len(student.head))
    pad_id = int(job.tokenizer.pad_token_id)
    trainer = Trainer(student, pad_id, job.examples, job.teacher, job.recipe, job.device, job.base_cache)
    del student
    initial_student = partial(make_student, torch.device("cpu"))
    loop = Loop(trainer, job.tokenizer, work, signals, initial_student, job.options, memory_before)

    # From here a signal waits for the end of the step, and after the last step for the output.
    with signals.deferred():
        name, values, options = work.output.path.name, job.recipe.values(), job.options
        with tracked(options.log_to, name, values, resumed=options.resume) as tracker:
            log_line(f"metrics of each step: {work.metrics}", job.options.quiet)
            callbacks = [callback for callback in (job.callback, tracker) if callback is not None]
            summary = loop.train(callbacks)
        run = {**about, **summary, "versions": versions(), "made_from": digests(work.identity)}
        run |= _memory_of(loop, run["measured_peak"])
        with work.output_folder() as stage:
            loop.write(stage, job.base if job.options.save_adapter else None)
            if is_main_process():
                # --overwrite recognizes a folder that this run wrote by these names.
                run["files"] = sorted([*(path.name for path in stage.iterdir()), RUN])
                write_atomically(stage / RUN, json.dumps(nan_to_null(run), indent=1, allow_nan=False) + "\n")
    return run


def recipe_file(recipe: str | Path) -> str | Path | None:
    """The file of a recipe that the user gave as a path; None for the name of a shipped recipe."""
    return recipe if str(recipe).endswith(".toml") else None


def raise_failure(run: Mapping[str, Any], out: Path) -> None:
    """Raise NekoLeanError if the run ended in a loss or gradient that is NaN or infinite. Called once the output is in
    place, so that the checkpoint is kept."""
    if run["failure"]:
        raise NekoLeanError(
            f"{run['failure']}; {out} holds the checkpoint of step {run['weights_of_step']}: lower lr and run again."
        )


def _memory_of(loop: Loop, measured_peak: int) -> dict[str, Any]:
    """Predicted and measured peak memory, for run.json."""
    trainer, state = loop.trainer, loop.state
    per_rank = all_gather_objects(measured_peak)
    config = trainer.student.model.config
    return {
        "predicted_peak": predicted_peak(config, trainer.recipe, state.largest, state.wanted, loop.device),
        "measured_peak": max(per_rank),
        **({"measured_peaks": per_rank} if len(per_rank) > 1 else {}),
    }
