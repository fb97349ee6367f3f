"""The preparation of a score: read and check all inputs, claim the outputs, and make the plan."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neko_lean.data import PromptFormat, describe_rows, find_format
from neko_lean.models import (
    CausalLM,
    Model,
    load_model,
    load_tokenizer,
    model_folder,
    model_name,
    pick_device,
    pick_dtype,
    usable_length,
)
from neko_lean.options import OutputOptions, ScoreInputs, ScoreSettings
from neko_lean.outputs import Output
from neko_lean.scoring.benchmarks.option import format_of, limits_of
from neko_lean.scoring.documents import ReferenceLosses, reference_losses
from neko_lean.scoring.generation import GenerationLimits
from neko_lean.scoring.inputs import (
    DataSources,
    ScoreData,
    check_lengths,
    check_lm_eval,
    check_settings,
    claim_outputs,
    count_blind,
    membership_path,
    read_data,
)
from neko_lean.scoring.limits import MAX_LENGTH
from neko_lean.scoring.plan import digest_of_run, make_plan
from neko_lean.terminal import log_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoreJob:
    """A score that is ready to run: all inputs read and checked, no model loaded.

    Attributes:
        name: the model's name for scores.json.
        folder: the checkpoint.
        tokenizer: its tokenizer.
        prompts: the prompt format.
        data: what it is scored on.
        settings: how it is measured.
        limits: where batches and generations end.
        device: where the model runs.
        device_option: the device as given by the user.
        dtype: the model's dtype, by name.
        reference: a reference model's losses of the membership documents.
        blind: numbers of examples that the official scores cannot judge, by split.
        output: where the score is written.
        official: where the shared task's results file is written.
        plan: what the generations depend on.
        made_from: digest of everything that the scores depend on.
        started: time at which the work began, in seconds.
        quiet: whether to hide progress.
    """

    name: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptFormat
    data: ScoreData
    settings: ScoreSettings
    limits: GenerationLimits
    device: torch.device
    device_option: str | None
    dtype: str
    reference: ReferenceLosses | None
    blind: dict[str, dict[str, int]]
    output: Output
    official: Output | None
    plan: dict[str, Any]
    made_from: str
    started: float
    quiet: bool

    def load(self, folder: Path) -> CausalLM:
        """Load a checkpoint as this job measures it."""
        return load_model(folder, pick_dtype(self.dtype), self.device)


def prepare(
    model: Model,
    out: str | Path,
    sources: DataSources,
    inputs: ScoreInputs,
    settings: ScoreSettings,
    run: OutputOptions,
) -> ScoreJob:
    """Read and check all inputs and outputs."""
    # The request itself.
    check_settings(inputs, settings)
    device = pick_device(run.device)
    if settings.dtype is not None:
        pick_dtype(settings.dtype)
    claim_outputs(model, sources, out, inputs, run)
    score_data = read_data(sources, inputs, settings)
    folder = model_folder(model)
    output, official = claim_outputs(folder, sources, out, inputs, run)
    check_lm_eval(folder, settings)

    # The data in this tokenizer.
    dtype = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    tokenizer = load_tokenizer(folder)
    prompts = format_of(score_data.benchmark, find_format(settings.format, tokenizer, settings.system))
    for split, rows in score_data.rows.items():
        log_line(describe_rows(rows, split), run.quiet)
    log_line(f"prompt format: {prompts.label}", run.quiet)
    reference = None
    if score_data.teacher is not None and inputs.mia is not None:
        limit = usable_length(folder, MAX_LENGTH)
        nonmembers = membership_path(Path(inputs.mia), "nonmember")
        documents, examples = score_data.documents, score_data.rows["forget"]
        reference = reference_losses(score_data.teacher, nonmembers, documents, examples, tokenizer, limit)
    check_lengths(score_data, tokenizer, prompts)
    blind = count_blind(score_data, tokenizer)

    # What identifies the result.
    started = time.monotonic()
    limits = limits_of(score_data.benchmark, settings)
    plan = make_plan(folder, tokenizer, score_data, prompts, limits.max_new_tokens, dtype)
    return ScoreJob(
        name=model_name(model),
        folder=folder,
        tokenizer=tokenizer,
        prompts=prompts,
        data=score_data,
        settings=settings,
        limits=limits,
        device=device,
        device_option=run.device,
        dtype=dtype,
        reference=reference,
        blind=blind,
        output=output,
        official=official,
        plan=plan,
        made_from=digest_of_run(plan, score_data, inputs, settings, device),
        started=started,
        quiet=run.quiet,
    )
