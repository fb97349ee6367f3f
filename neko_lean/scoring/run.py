"""`score`: generate, measure, attack and judge one checkpoint, and write the results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.checkpoints import versions
from neko_lean.data import RowSource
from neko_lean.distributed import run_on_main_and_broadcast, with_process_group
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import jsonl_text, strict_json
from neko_lean.models import Model, accepts_loaded_model, memory_in_use, peak_memory, reset_peak_memory
from neko_lean.options import OutputOptions, ScoreInputs, ScoreSettings
from neko_lean.outputs import Output, locked, publish_file
from neko_lean.scoring.attacks import AttackTarget, run_attacks
from neko_lean.scoring.attacks.answers import AnswerGenerator
from neko_lean.scoring.inputs import sources_of
from neko_lean.scoring.job import ScoreJob, prepare
from neko_lean.scoring.judge import broken_reasons
from neko_lean.scoring.limits import TruncationCounts
from neko_lean.scoring.lm_eval import lm_eval_tasks
from neko_lean.scoring.measure import ScoringContext, generate_answers
from neko_lean.scoring.official import official_results
from neko_lean.scoring.results import Measured, difference, measure_all, task_scores
from neko_lean.scoring.score_folder import (
    GENERATIONS,
    SCORES,
    check_score_folder,
    finished_score,
    open_score_folder,
    write_result,
    writing,
)
from neko_lean.scoring.stored import read_score
from neko_lean.scoring.task import SPLITS
from neko_lean.scoring.verdict import verdict
from neko_lean.terminal import log_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@with_process_group()
@accepts_loaded_model
def score(
    model: Model,
    out: str | Path,
    *,
    data: str | Path | None = None,
    forget: RowSource | None = None,
    retain: RowSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: ScoreInputs = ScoreInputs(),
    settings: ScoreSettings = ScoreSettings(),
    run: OutputOptions = OutputOptions(),
) -> dict[str, Any]:
    """Score a checkpoint with the shared task's metrics, and with others that reveal what those miss.

    Under torchrun the examples are divided among the ranks, and the main process writes; the numbers are those of a
    single process.

    Args:
        model: checkpoint folder, hub name (owner/name or owner/name@revision), or a loaded transformers model.
        out: folder to write: scores.json, generations.jsonl, documents.jsonl. It only appears once it is complete.
        data: folder with `forget.*` and `retain.*` (with `inputs.split`: `forget_<split>.*`, ...).
        forget, retain: instead of `data`, the two sets as for `read_rows`.
        tokenizer: the tokenizer of a loaded model.
        inputs: further data to measure on.
        settings: how the model is measured.
        run: device, and how existing output is treated.

    Returns:
        The content of scores.json, whose keys docs/score.md explains; of a dry run, what would be scored and where.

    Raises:
        NekoLeanError: an input is invalid, or an option would have no effect.

    Example::

        scores = neko_lean.score("unlearned/", "scores/", data="data/", inputs=ScoreInputs(before="scores-before/"))
        print(scores["task_aggregate"], *scores["verdict"], sep="\\n")
    """
    job = prepare(model, out, sources_of(data, forget, retain, inputs), inputs, settings, run)
    dry_run = run.dry_run
    finished = finished_score(job.output, job.made_from, job.plan, dry_run=dry_run) if run.resume else None
    if run.dry_run:
        if finished is None:
            check_score_folder(job.output, job.plan, resume=run.resume)
        return _planned(job)
    if finished is not None:
        return _reuse(job, finished)

    with open_score_folder(job.output, job.plan, resume=run.resume, quiet=run.quiet) as stage:
        scores, lines = _run(job, stage)
        run_on_main_and_broadcast(writing(stage, lambda: _write(stage, scores, lines)))
    if job.official is not None:
        _write_official(job, job.official, scores, lines)
    return scores


def _planned(job: ScoreJob) -> dict[str, Any]:
    """What a dry run says about a score."""
    data = job.data
    return {
        "dry_run": True,
        "model": job.name,
        "out": str(job.output.path),
        "replaces": job.output.path.exists(),
        "official": None if job.official is None else str(job.official.path),
        "rows": {split: len(data.split(split)) for split in SPLITS},
        "documents": {"mia": len(data.documents), "held": len(data.held_out)},
        "mmlu_subjects": 0 if data.subjects is None else len(data.subjects),
        "attacks": list(job.settings.attacks),
        "lm_eval": list(job.settings.lm_eval),
        "format": job.prompts.name,
        "dtype": job.dtype,
        "device": str(job.device),
        "max_new_tokens": job.limits.max_new_tokens,
    }


def _run(job: ScoreJob, stage: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute scores.json and the lines of generations.jsonl."""
    truncated = TruncationCounts()
    memory_before = memory_in_use(job.device)
    reset_peak_memory(job.device)
    measured, target, attacks = _measure_and_attack(job, stage, truncated)

    # The model is out of memory now; these load it themselves, one at a time.
    attacks |= run_attacks(job.settings.attacks, target, reloads_model=True)
    lm_eval = None
    if job.settings.lm_eval:
        lm_eval = run_on_main_and_broadcast(
            lambda: lm_eval_tasks(job.folder, job.settings.lm_eval, str(job.device), job.dtype, job.settings.batch_size)
        )

    scores: dict[str, Any] = {
        "model": job.name,
        **task_scores(job.data, measured, job.blind),
        **measured.scores,
        "attacks": attacks,
        "lm_eval": lm_eval,
    }
    scores["final"] = _final(scores)
    scores["difference"] = None if job.data.before is None else difference(scores, measured.lines, job.data.before)
    scores["verdict"] = verdict(scores, job.data.before)
    scores["broken"] = bool(broken_reasons(scores, job.data.before))
    scores |= {
        "rows": {split: len(job.data.split(split)) for split in SPLITS},
        "format": job.prompts.name,
        "dtype": job.dtype,
        "device": str(job.device),
        "max_new_tokens": job.limits.max_new_tokens,
        "cut": asdict(truncated),
        "versions": versions(),
        "made_from": job.made_from,
        "wall_seconds": time.monotonic() - job.started,
        "peak_memory": peak_memory(job.device, memory_before),
    }
    return scores, measured.lines


def _measure_and_attack(
    job: ScoreJob, stage: Path, truncated: TruncationCounts
) -> tuple[Measured, AttackTarget, dict[str, Any]]:
    """Everything that needs the loaded model, which is freed when this returns."""
    lm = job.load(job.folder)
    context = ScoringContext(lm, job.tokenizer, job.prompts, stage, job.limits, truncated, job.quiet)
    generations = generate_answers(context, job.data.all_examples)
    measured = measure_all(context, job.data, generations, job.reference, job.settings.shots)

    forget = job.data.split("forget")  # the first of all examples
    target = AttackTarget(
        folder=job.folder,
        lm=None,
        load=job.load,
        tokenizer=job.tokenizer,
        examples=forget,
        baseline={example.id: generation for example, generation in zip(forget, generations, strict=False)},
        paraphrases=job.data.paraphrases,
        generate=AnswerGenerator(job.tokenizer, job.limits, truncated, job.quiet, job.prompts),
        stage=stage,
        settings=job.settings,
        device=job.device_option,
    )
    attacks = run_attacks(job.settings.attacks, target.with_model(lm), reloads_model=False)
    return measured, target, attacks


def _final(scores: Mapping[str, Any]) -> float | None:
    """The shared task's final score: the mean of task aggregate, membership score and MMLU, if all were measured."""
    aggregate, members, mmlu = scores["task_aggregate"], scores["membership"], scores["mmlu"]
    if aggregate is None or members is None or mmlu is None:
        return None
    parts = aggregate, members["score"], mmlu["micro"]
    return float(sum(parts) / len(parts))


def _write(stage: Path, scores: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the results to the stage; raises NekoLeanError if one is NaN or infinite."""
    strict_json(lines, GENERATIONS)
    write_result(stage, strict_json(scores, SCORES, indent=1) + "\n", jsonl_text(lines))


def _reuse(job: ScoreJob, finished: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of the same run that is already complete, and write its official results if requested."""
    read_score(job.output.path, job.data.examples)
    log_line(f"{job.output.path} is complete: nothing to do.", job.quiet)
    if job.official is not None:
        _write_official(job, job.official, finished, run_on_main_and_broadcast(lambda: _finished_lines(job)))
    return finished


def _finished_lines(job: ScoreJob) -> list[dict[str, Any]]:
    """The lines of a finished score, read under a lock so that no other run can replace them."""
    with locked(job.output):
        stored = read_score(job.output.path, job.data.examples)
    if stored.get("made_from") != job.made_from:
        raise NekoLeanError(f"{job.output.path} was replaced by another run in the meantime: run again.")
    lines: list[dict[str, Any]] = stored["lines"]
    return lines


def _write_official(job: ScoreJob, file: Output, scores: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the shared task's results file."""
    by_id = {(line["split"], line["id"]): line["score"] for line in lines}
    scored = {split: [(example, by_id[split, example.id]) for example in job.data.split(split)] for split in SPLITS}
    text = strict_json(official_results(scores, scored), str(file.path), indent=4) + "\n"
    run_on_main_and_broadcast(lambda: publish_file(text, file, "--official"))
