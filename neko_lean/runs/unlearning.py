"""`unlearn` as a function: check the input, prepare examples and teacher cache, train, write the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.cache import SELF_GENERATED, CacheOptions, TeacherCache, cache_teacher, self_generated_file
from neko_lean.checkpoints import check_run_folder
from neko_lean.data import (
    Example,
    RowSource,
    describe_rows,
    paths_among,
    read_anchor,
    read_rows,
    refuse_unused_split,
    unseen_anchor,
    without_overlap,
)
from neko_lean.distributed import run_on_main_and_broadcast, with_process_group
from neko_lean.errors import NekoLeanError
from neko_lean.models import (
    Model,
    ModelIdentity,
    accepts_loaded_model,
    check_seed,
    identify,
    load_model,
    load_tokenizer,
    model_config,
    model_name,
    pick_device,
    pick_dtype,
    usable_length,
)
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.outputs import MANIFEST, file_sha256
from neko_lean.recipe import (
    AUTO,
    DEFAULT,
    Recipe,
    forgets,
    load_recipe,
    needs_alternatives,
    reads_cache,
    reads_forget_losses,
    reads_retain,
    uses_anchor,
    uses_levels,
)
from neko_lean.runs.dry_run import plan_training, planned_examples
from neko_lean.runs.examples import PreparedExamples, prepare_examples, report_truncation, training_examples
from neko_lean.runs.learning_rates import with_learning_rate
from neko_lean.runs.trackers import check_tracker
from neko_lean.runs.training_run import (
    TrainingJob,
    check_extras,
    check_trained_layers,
    claim_before_download,
    finished_before,
    identity_of,
    raise_failure,
    recipe_file,
    train,
    work_folder,
)
from neko_lean.terminal import log_line
from neko_lean.training import Callback

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Path = str | Path | None


@with_process_group()
@accepts_loaded_model
def unlearn(
    model: Model,
    out: str | Path,
    *,
    forget: RowSource,
    retain: RowSource | None = None,
    anchor: RowSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache: str | Path | None = None,
    base_cache: str | Path | None = None,
    recipe: str | Path = DEFAULT,
    overrides: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    run: RunOptions = RunOptions(),
) -> dict[str, Any]:
    """Train a model to forget the forget set while its behaviour on the retain set is preserved.

    Without a `cache`, the teacher is cached first and the cache is deleted at the end; teacher and student are never in
    memory together.

    Args:
        model: checkpoint folder, hub name (owner/name or owner/name@revision), or a loaded transformers model. It is
            not changed. A loaded model is saved in a temporary folder, and stays in memory in addition to the student.
        out: folder to write: a checkpoint with tokenizer, run.json and metrics.jsonl. It appears when it is complete.
        forget, retain: data sets as for `read_rows`: files, folders that hold `forget.*` and `retain.*`, lists of
            dicts, DataFrames or Datasets. Without `retain`, the model itself writes `recipe.self_generated` rows before
            the run, and these are preserved; with a `cache`, they are those that the cache holds.
        anchor: what the model never saw, as for `read_anchor`; with a `cache`, what that was made with. Preserved like
            the retain set, and the source of the levels of forget tokens.
        tokenizer: the tokenizer of a loaded model.
        cache: folder that `cache_teacher` wrote for this model and these retain rows.
        base_cache: cache of the model before it learned these forget rows; its losses are then the levels. If it holds
            the anchor too, the levels follow the student's losses there relative to that model's, and a recipe that
            learns its distributions (base-kl) keeps the anchor as that model predicts it, not as the teacher does.
        recipe, overrides: name of a shipped recipe or path of a .toml file, and values that replace its own.
        callback: called after each step as `callback(step, metrics)`, on the main process only. `metrics` are the
            values that metrics.jsonl has for the step.
        run: split and columns of the data, device, seed, tracking, saving, and how to treat an existing output.

    Returns:
        The contents of run.json; of a dry run, what `plan_training` returns.

    Raises:
        NekoLeanError: bad input, retain rows that are also in the forget set, an argument without effect, or a loss or
            gradient that became NaN or infinite; then `out` holds the checkpoint of the best evaluation or last save,
            if there is one.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the current step was completed and saved.

    Example:
        neko_lean.unlearn("allenai/OLMo-1B-0724-hf", "unlearned/", forget="data/", retain="data/")
    """
    # Check everything that can be checked without the model.
    check_seed(run.seed)
    check_tracker(run.log_to)
    chosen = load_recipe(recipe, overrides)
    refuse_unused_split(run.split, forget, retain)
    from_cache = retain is None and cache is not None and reads_retain(chosen)
    if from_cache:
        assert cache is not None
        retain = self_generated_file(cache)
    self_generates = _self_generates(chosen, retain)
    _refuse_unused(chosen, overrides or {}, retain, cache, anchor, base_cache)
    check_extras(chosen, run, forget, retain)
    device = pick_device(run.device)
    inputs = [*paths_among(forget, retain, anchor), cache, base_cache, recipe_file(recipe)]
    output, folder = claim_before_download(out, model, inputs, run)
    check_trained_layers(folder, chosen)
    given_lr = chosen.lr
    chosen = with_learning_rate(chosen, folder)

    # Examples, caches, and what makes this run the same run.
    tokenizer = load_tokenizer(folder)
    max_length = usable_length(folder, chosen.max_length)
    # The rows that a teacher wrote have their own columns.
    data = _read_data(forget, retain, anchor, run, retain_columns=None if from_cache else run.columns)
    prepare = partial(
        prepare_examples,
        data.forget,
        anchor=data.anchor,
        recipe=chosen,
        tokenizer=tokenizer,
        max_length=max_length,
        seed=run.seed,
    )
    prepared = prepare(data.retain)
    teacher, base = _open(cache), _open(base_cache)
    model_identity = identify(folder, tokenizer)
    parts = {
        "model": model_identity.weights,
        "tokenizer": model_identity.tokenizer,
        "config": model_config(folder, training=True) if chosen.dropout else model_identity.config,
        **prepared.digests(),
        "cache": _digest(teacher),
        "base cache": _digest(base),
    }
    identity = identity_of("unlearn", chosen, run.seed, device, parts)
    if (result := finished_before(output, identity, run)) is not None:
        return result

    if run.dry_run:
        check_run_folder(output, identity, resume=run.resume)
        if teacher is not None and reads_cache(chosen, anchor=bool(prepared.anchor)):
            _check_teacher(teacher, model_identity, chosen, prepared, verify=True)
        _log_rows(data, (), run.quiet)
        lost = report_truncation(prepared, chosen, run.quiet)
        examples = planned_examples(prepared, chosen, teacher, base, tokenizer, self_generates)
        plan = plan_training(folder, output, examples, chosen, device, run.seed)
        return {**plan, "self_generated": chosen.self_generated * self_generates, "forget_answers_lost": lost}

    with work_folder(output, identity, run) as (work, signals):
        logged: list[str] = []
        if teacher is None and (self_generates or reads_cache(chosen, anchor=bool(prepared.anchor))):
            cached_forget = forget if _caches_forget(chosen, data, base) else None
            teacher = _cache_teacher(folder, retain, anchor, cached_forget, work.cache, chosen, run)
            logged = ["retain"] if cached_forget is None else ["retain", "forget"]
        if self_generates:
            prepared = prepare(read_rows(work.cache / SELF_GENERATED))
        if not reads_cache(chosen, anchor=bool(prepared.anchor)):
            teacher = None  # it only wrote the retain set
        if teacher is not None:
            _check_teacher(teacher, model_identity, chosen, prepared, verify=cache is not None)
        _log_rows(data, logged, run.quiet)
        if given_lr == AUTO:
            log_line(f"lr: {chosen.lr:.1e}, by the model's hidden size", run.quiet)
        examples = training_examples(prepared, chosen, teacher, base, tokenizer)
        lost = report_truncation(prepared, chosen, run.quiet)

        student = partial(load_model, folder, pick_dtype(chosen.dtype))
        job = TrainingJob(student, tokenizer, examples, teacher, chosen, device, run, str(model), callback, base)
        about = {"command": "unlearn", "model": model_name(model), "forget_answers_lost": lost}
        about["self_generated"] = chosen.self_generated if self_generates else 0
        result = train(job, work, signals, about)
    raise_failure(result, output.path)
    return result


@dataclass(frozen=True)
class _Data:
    """The rows of an unlearning run.

    Attributes:
        forget: the examples to forget.
        retain: the examples to preserve, without those that are also in the forget set; None if the model has yet to
            write them.
        anchor: what the model never saw, as examples.
        descriptions: a sentence for each set on what was recognised.
    """

    forget: list[Example]
    retain: list[Example] | None
    anchor: list[Example]
    descriptions: dict[str, str]


def _read_data(
    forget: RowSource,
    retain: RowSource | None,
    anchor: RowSource | None,
    run: RunOptions,
    retain_columns: str | None,
) -> _Data:
    """Read the data sets of a run, and refuse or leave out what is in the forget set and elsewhere."""
    forget_rows = read_rows(forget, "forget", run.split, columns=run.columns)
    descriptions = {"forget": describe_rows(forget_rows, "forget")}
    retain_rows: list[Example] | None = None
    if retain is not None:
        rows = read_rows(retain, "retain", run.split, columns=retain_columns)
        descriptions["retain"] = describe_rows(rows, "retain")
        retain_rows = without_overlap(forget_rows, rows, "retain", drop=run.drop_overlap)
    anchor_rows = [] if anchor is None else read_anchor(anchor, run.columns)
    anchor_rows = unseen_anchor(anchor_rows, forget_rows, retain_rows or [], run.drop_overlap)
    return _Data(forget_rows, retain_rows, anchor_rows, descriptions)


def _open(cache: _Path) -> TeacherCache | None:
    return None if cache is None else TeacherCache(cache)


def _digest(cache: TeacherCache | None) -> str:
    """SHA-256 of a cache's manifest, which holds the SHA-256 of everything else. '' for a cache that the run makes
    itself, which follows from the other parts of its identity."""
    return "" if cache is None else file_sha256(cache.folder / MANIFEST)


def _log_rows(data: _Data, logged: Sequence[str], quiet: bool) -> None:
    """Log what was recognised in the data, except for sets that `cache_teacher` has just read and `logged`."""
    for name, description in data.descriptions.items():
        if name not in logged:
            log_line(description, quiet)


def _self_generates(recipe: Recipe, retain: RowSource | None) -> bool:
    """Whether the model has to write the retain set itself."""
    return retain is None and reads_retain(recipe)


def _caches_forget(recipe: Recipe, data: _Data, base: TeacherCache | None) -> bool:
    """Whether a cache that the run makes itself is given the forget set: for objectives that compare with the teacher,
    for levels of what the anchor has examples of, and because self-generated rows must not repeat the forget set."""
    kinds = {row.kind == "qa" for row in data.anchor}
    spreads_levels = base is None and any((row.kind == "qa") in kinds for row in data.forget)
    return data.retain is None or reads_forget_losses(recipe, anchor=spreads_levels)


def _cache_teacher(
    folder: Path,
    retain: RowSource | None,
    anchor: RowSource | None,
    forget: RowSource | None,
    out: Path,
    recipe: Recipe,
    options: RunOptions,
) -> TeacherCache:
    """Cache the teacher for this run alone, in its work folder."""
    self_generates = _self_generates(recipe, retain)
    cache_teacher(
        folder,
        out,
        retain=retain,
        anchor=anchor,
        forget=forget,
        cache=CacheOptions(
            split=options.split if retain is not None or forget is not None else None,
            columns=options.columns,
            drop_overlap=options.drop_overlap and forget is not None,
            mass=1.0 if needs_alternatives(recipe) else CacheOptions.mass,
            self_generated=recipe.self_generated if self_generates else 0,
            seed=options.seed if self_generates else 0,
            format=recipe.format,
            system=recipe.system,
            max_length=recipe.max_length,
            batch_tokens=recipe.batch_tokens,
            dtype=recipe.dtype,
        ),
        run=OutputOptions(device=options.device, resume=options.resume, quiet=options.quiet),
    )
    return TeacherCache(out)


def _check_teacher(
    teacher: TeacherCache, identity: ModelIdentity, recipe: Recipe, prepared: PreparedExamples, *, verify: bool
) -> None:
    """Refuse a cache of another model, tokenizer, prompt format or retain set; with `verify`, read all of it now, so
    that a damaged shard does not end the run hours later."""
    teacher.check(identity, style=prepared.prompts.name, max_length=recipe.max_length, encoded=prepared.retain)
    teacher.refuse_shots()
    if needs_alternatives(recipe) and teacher.manifest.mass < 1:
        log_line(
            f"warning: recipe {recipe.name} trains towards what the teacher would say instead of a memorized token, "
            f"which a cache with a mass of {teacher.manifest.mass} mostly lacks; make it with --mass 1."
        )
    if verify:
        run_on_main_and_broadcast(teacher.verify_numbers)


def _refuse_unused(
    recipe: Recipe,
    overrides: Mapping[str, Any],
    retain: RowSource | None,
    cache: _Path,
    anchor: RowSource | None,
    base_cache: _Path,
) -> None:
    """Raise NekoLeanError for an argument that would not change the run."""
    objectives = f"retain_objective {recipe.retain_objective} and forget_objective {recipe.forget_objective}"
    if not forgets(recipe):
        raise NekoLeanError(
            f"recipe {recipe.name} forgets nothing: it has neither a forget_objective nor a substitute; choose another "
            f"recipe, or use `memorize` to train on the data."
        )
    if "self_generated" in overrides and retain is not None:
        raise NekoLeanError("self_generated has no effect on a run that is given its retain set; leave it out.")
    if base_cache is not None and not uses_levels(recipe):
        raise NekoLeanError(
            f"--base-cache {base_cache} has no effect: recipe {recipe.name} has {objectives}, and only a "
            f"forget_objective with levels, such as calibrated, reads it; leave it out."
        )
    if base_cache is None and recipe.forget is not None and recipe.forget.base_top_k:
        raise NekoLeanError(
            f"recipe {recipe.name} needs --base-cache: the cache that `cache-teacher --forget` makes with the model "
            f"from before it learned the forget set; use recipe calibrated if you do not have that model."
        )
    if anchor is not None and not uses_anchor(recipe, base_cache=base_cache is not None):
        raise NekoLeanError(
            f"--anchor has no effect: recipe {recipe.name} uses it neither as retain rows nor for levels; leave it out."
        )
    if cache is not None and not reads_cache(recipe, anchor=anchor is not None):
        condition = "without --anchor, " if uses_levels(recipe) else ""
        raise NekoLeanError(
            f"--cache {cache} has no effect: {condition}recipe {recipe.name} reads no teacher ({objectives}); leave it "
            f"out."
        )
    source = "--base-cache" if base_cache is not None else "--anchor" if anchor is not None else ""
    if source and uses_levels(recipe) and "level" in overrides:
        raise NekoLeanError(f"level has no effect: {source} determines each token's level; leave one of them out.")
