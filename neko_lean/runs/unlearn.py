"""`unlearn` and `memorize` as functions: check the input, load what is needed, train, write the output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neko_lean.cache import TeacherCache, cache_teacher
from neko_lean.checkpoints import digests, finished_run, handle_signals, open_run_folder, rows_digest, versions
from neko_lean.data import (
    EncodedExample,
    encode,
    position_warning,
    random_answers,
    read_anchor,
    read_rows,
    refusals,
    truncation_summary,
)
from neko_lean.distributed import (
    all_gather_objects,
    is_main_process,
    run_on_main_and_broadcast,
    with_process_group,
    world_size,
)
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import nan_to_null
from neko_lean.memory import predicted_peak
from neko_lean.models import (
    check_seed,
    holds_weights,
    identify,
    load_model,
    load_tokenizer,
    model_config,
    model_folder,
    model_name,
    new_model,
    pick_device,
    pick_dtype,
    read_config,
    resident_memory,
    tokenizer_fingerprint,
    trim_memory,
    usable_length,
    warn_emulated_bfloat16,
    weights_fingerprint,
)
from neko_lean.options import RunOptions
from neko_lean.outputs import MANIFEST, RUN, claim_folder, explained_write_errors, file_sha256, write_atomically
from neko_lean.recipes import (
    DEFAULT,
    NEED_FORGET_CACHE,
    Recipe,
    forgets,
    load_recipe,
    reads_cache,
    reads_retain,
    uses_anchor,
)
from neko_lean.terminal import log_line
from neko_lean.training import Loop, Trainer, TrainingExamples, explained_out_of_memory, forget_start, with_levels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from neko_lean.data import count_lost_answers, require_folder


@with_process_group()
def unlearn(
    model: str | Path,
    out: str | Path,
    forget: str | Path,
    retain: str | Path,
    *,
    cache: str | Path | None = None,
    anchor: str | Path | None = None,
    base_cache: str | Path | None = None,
    recipe: str | Path = DEFAULT,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Push the forget set out of `model`, hold the retain set still, write the result to the folder `out`.

    `unlearn(model_path, output_path, forget_dir, retain_dir)` is the signature by which the shared task ran its
    entries: without a `cache` the teacher is cached first, thrown away at the end, and gone from memory before the
    student is loaded.

    Args:
        model: checkpoint folder, or hub name: owner/name or owner/name@revision.
        out: folder to write: a complete checkpoint with tokenizer, run.json and metrics.jsonl. Appears when complete.
        forget, retain: parquet, jsonl or csv files, or folders holding `forget.*` and `retain.*`.
        cache: folder that cache_teacher wrote for this model and these retain rows.
        anchor: jsonl file of documents that the model never saw (columns document and, if wanted, task), to hold still
            and to judge by what a forgotten token should cost; cache_teacher takes it too.
        base_cache: folder that cache_teacher wrote, with these forget rows, of the model as it was before it learned
            them, where that is at hand: then its losses are what each forgotten token should cost.
        recipe: name of a shipped recipe, or a .toml file.
        overrides: values of the recipe to replace, by key.
        seed: of the order of rows and of the rounding.
        device: 'cpu', 'cuda', 'cuda:N'; by default the GPU where there is one.
        save_every: steps between saves to `.NAME.saved` beside `out`; 0: only where a signal ends the run.
        resume: go on from the last save of the same run and end in the same weights; from the beginning without one.
        overwrite: replace what `out` holds; and without `resume`, what an unfinished run has left.

    Arguments that the recipe does not use (`cache`, `anchor`, `base_cache`) are refused, as is a recipe that forgets
    nothing.
    The `retain` rows alone, which the signature asks for, are only checked where the recipe does not read them.

    Returns what run.json holds. Raises NekoLeanError for bad input, and when a loss or gradient stops being finite:
    then `out` holds the checkpoint of the best evaluation or else of the last save, if there was one, and nothing
    otherwise. Raises signals.Interrupted when SIGINT, SIGTERM or SIGHUP arrives, once the step is finished and saved.
    """
    check_seed(seed)
    chosen = load_recipe(recipe, overrides)
    _refuse_unused(chosen, overrides, cache, anchor, base_cache)
    folder, place = model_folder(model), pick_device(device)
    inputs = [folder, forget, retain, cache, anchor, base_cache, _recipe_file(recipe)]
    output = claim_folder(out, "saved", inputs, overwrite=overwrite, resume=resume)
    tokenizer = load_tokenizer(folder)
    pad_id = int(tokenizer.pad_token_id)
    limit = usable_length(folder, chosen.max_length)
    forget_rows = _encode(forget, "forget", tokenizer, chosen, limit)
    retain_rows = _encode(retain, "retain", tokenizer, chosen, limit)
    if not reads_retain(chosen):
        log_line(f"retain: not used, as recipe {chosen.name} has no retain objective", quiet)
    anchors = encode(read_anchor(anchor), tokenizer, "plain", limit) if anchor is not None else []
    _refuse_nothing_to_forget(forget_rows, chosen)
    substitutes = _substitutes(forget_rows, retain_rows, tokenizer, chosen, limit, seed)
    if warning := position_warning([*forget_rows, *retain_rows, *anchors], limit, chosen.max_length):
        log_line(warning)
    retain_rows = [*retain_rows, *anchors] if chosen.retain_objective != "none" else []
    cached = reads_cache(chosen, anchor=bool(anchors))
    teacher = TeacherCache(cache) if cache is not None else None
    before_learning = TeacherCache(base_cache) if base_cache is not None else None
    model_identity = identify(folder, tokenizer)
    identity = {
        **_identity("unlearn", chosen, seed, place),
        "model": model_identity.weights,
        "tokenizer": model_identity.tokenizer,
        "config": model_config(folder, training=True) if chosen.dropout else model_identity.config,
        "forget rows": rows_digest(forget_rows),
        "retain rows": rows_digest(retain_rows),
        "anchor": rows_digest(anchors),
        "cache": _cache_digest(teacher),
        "base cache": _cache_digest(before_learning),
    }
    done = finished_run(output, identity) if resume else None
    if done is not None:
        log_line(f"{output.path} is complete: nothing to do.", quiet)
        _raise_failure(done, output.path)
        return done
    with (
        handle_signals() as signals,
        open_run_folder(output, identity, save_every=save_every, resume=resume) as work,
        explained_write_errors(output.path),
        explained_out_of_memory(),
    ):
        if cached and teacher is None:
            cache_teacher(
                folder,
                retain,
                work.cache,
                anchor=anchor,
                forget=forget if chosen.forget_objective in NEED_FORGET_CACHE else None,
                format=chosen.format,
                max_length=chosen.max_length,
                batch_tokens=chosen.batch_tokens,
                device=device,
                dtype=chosen.dtype,
                resume=resume,
                quiet=quiet,
            )
            teacher = TeacherCache(work.cache)
        if teacher is not None:
            teacher.check(
                model_identity,
                style=chosen.format,
                max_length=chosen.max_length,
                encoded=retain_rows,
            )
            if cache is not None:
                # All of it now: a shard that is damaged must not end the run hours later.
                run_on_main_and_broadcast(teacher.verify_numbers)
        if chosen.forget_objective == "calibrated":
            forget_rows = _leveled(forget_rows, anchors, teacher, before_learning, tokenizer, chosen)
        for name, encoded in (("forget", forget_rows), ("retain", retain_rows)):
            if encoded:
                log_line(f"{name}: {truncation_summary(encoded, limit)}", quiet)
        lost = count_lost_answers(forget_rows)
        if lost:
            # Even --quiet does not hide that part of the forget set will not be forgotten.
            log_line(
                f"warning: the length limit of {limit} removes the whole answer of {lost} of "
                f"{len(forget_rows)} forget rows; they get no forget loss."
            )
        trim_memory()
        before = resident_memory()
        warn_emulated_bfloat16(chosen.dtype, place, quiet)
        student = partial(load_model, folder, pick_dtype(chosen.dtype))
        lm = student(_whole_on(place))
        if teacher is not None:
            teacher.check_vocabulary(len(lm.head))
        examples = TrainingExamples(forget_rows, retain_rows, substitutes or ())
        trainer = Trainer(lm, pad_id, examples, teacher, chosen, place)
        options = RunOptions(seed=seed, quiet=quiet)
        loop = Loop(trainer, tokenizer, work, signals, partial(student, torch.device("cpu")), options)
        run = _train(loop, before, {"command": "unlearn", "model": model_name(model), "forget_answers_lost": lost})
    _raise_failure(run, output.path)
    return run


@with_process_group()
def memorize(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    recipe: str | Path = "memorize",
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] = ("forget", "retain"),
    split: str | None = None,
    seed: int = 0,
    device: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fine-tune `model` on the rows of `data` with cross-entropy: makes a target model, or a retain-only gold model.

    Args:
        model: as for unlearn; a folder with config.json and tokenizer but no weights starts at random.
        data: folder holding `forget.*` and `retain.*` (with `split`: `forget_<split>.*`, ...).
        out: folder to write, as for unlearn.
        sets: which of the two to learn; ('retain',) makes the gold model.

    The rest is as for unlearn.
    """
    check_seed(seed)
    chosen = load_recipe(recipe, overrides)
    if chosen.retain_objective != "ce" or forgets(chosen):
        raise NekoLeanError(
            f"recipe {chosen.name} is not for memorize: it needs retain_objective ce, no forget one and no substitute."
        )
    require_folder(data, "--data", sets, split)
    folder, place = model_folder(model), pick_device(device)
    output = claim_folder(out, "saved", [folder, data, _recipe_file(recipe)], overwrite=overwrite, resume=resume)
    tokenizer = load_tokenizer(folder)
    pad_id = int(tokenizer.pad_token_id)
    limit = usable_length(folder, chosen.max_length)
    encoded = [one for name in sets for one in _encode(data, name, tokenizer, chosen, limit, split)]
    log_line(truncation_summary(encoded, limit), quiet)
    if warning := position_warning(encoded, limit, chosen.max_length):
        log_line(warning)
    # Without weights the model follows from config.json and the seed.
    trained = holds_weights(folder)
    if not trained:
        log_line(f"{folder} holds no weights: the model starts from random ones, made from --seed {seed}.", quiet)
    identity = {
        **_identity("memorize", chosen, seed, place),
        "model": weights_fingerprint(folder) if trained else "random weights",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        # A random start follows from all of config.json, the spread of its values among it.
        "config": model_config(folder, training=chosen.dropout) if trained else read_config(folder),
        "rows": rows_digest(encoded),
    }
    done = finished_run(output, identity) if resume else None
    if done is not None:
        log_line(f"{output.path} is complete: nothing to do.", quiet)
        _raise_failure(done, output.path)
        return done

    dtype = pick_dtype(chosen.dtype)
    student = partial(load_model, folder, dtype) if trained else partial(new_model, folder, dtype, seed=seed)
    with (
        handle_signals() as signals,
        open_run_folder(output, identity, save_every=save_every, resume=resume) as work,
        explained_write_errors(output.path),
        explained_out_of_memory(),
    ):
        trim_memory()
        before = resident_memory()
        warn_emulated_bfloat16(chosen.dtype, place, quiet)
        trainer = Trainer(student(_whole_on(place)), pad_id, TrainingExamples(retain=encoded), None, chosen, place)
        options = RunOptions(seed=seed, quiet=quiet)
        loop = Loop(trainer, tokenizer, work, signals, partial(student, torch.device("cpu")), options)
        about = {"command": "memorize", "model": model_name(model), "random_start": not trained}
        run = _train(loop, before, {**about, "sets": list(sets)})
    _raise_failure(run, output.path)
    return run


def _recipe_file(recipe: str | Path) -> str | Path | None:
    """The file of a recipe that the user gave as one; None for a shipped recipe's name."""
    return recipe if str(recipe).endswith(".toml") else None


def _refuse_unused(
    recipe: Recipe,
    overrides: Mapping[str, Any] | None,
    cache: str | Path | None,
    anchor: str | Path | None,
    base_cache: str | Path | None,
) -> None:
    """Raise NekoLeanError for what was given to `unlearn` and would change nothing."""
    if not forgets(recipe):
        raise NekoLeanError(
            f"recipe {recipe.name} forgets nothing: it has neither a forget_objective nor a substitute; take another "
            f"recipe, or `memorize` to train on rows."
        )
    if base_cache is not None and recipe.forget_objective != "calibrated":
        raise NekoLeanError(
            f"--base-cache {base_cache} has no effect: it is for forget_objective calibrated, and recipe {recipe.name} "
            f"has {recipe.forget_objective}; leave it out."
        )
    if anchor is not None and not uses_anchor(recipe, base_cache=base_cache is not None):
        raise NekoLeanError(
            f"--anchor {anchor} has no effect: recipe {recipe.name} uses neither retain rows nor levels "
            f"from it; leave it out."
        )
    if cache is not None and not reads_cache(recipe, anchor=anchor is not None):
        why = "without --anchor " if recipe.forget_objective == "calibrated" else ""
        raise NekoLeanError(
            f"--cache {cache} has no effect: {why}recipe {recipe.name} asks no teacher (retain_objective "
            f"{recipe.retain_objective}, forget_objective {recipe.forget_objective}); leave it out."
        )
    source = "--base-cache" if base_cache is not None else "--anchor" if anchor is not None else ""
    if source and recipe.forget_objective == "calibrated" and "level" in (overrides or {}):
        raise NekoLeanError(f"level has no effect: {source} says what each token should cost; leave one of them out.")


def _refuse_nothing_to_forget(forget: Sequence[EncodedExample], recipe: Recipe) -> None:
    """Raise NekoLeanError where no token of any forget row would get a loss, and no substitute takes its place."""
    if recipe.substitute == "none" and not any(forget_start(one, recipe) < len(one) - 1 for one in forget):
        raise NekoLeanError(
            f"recipe {recipe.name} would forget nothing: with max_length {recipe.max_length} and answer_skip "
            f"{recipe.answer_skip} no token of the {len(forget)} forget rows gets a loss; raise the one or lower "
            f"the other."
        )


def _leveled(
    forget: Sequence[EncodedExample],
    anchors: Sequence[EncodedExample],
    teacher: TeacherCache | None,
    base: TeacherCache | None,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> list[EncodedExample]:
    """The forget rows with what each token should cost, from the best source there is: the model before it learned
    them, unseen documents, or the recipe's level for all."""
    if base is not None:
        # It is of the model as it was before, so only how text becomes tokens has to be the same.
        base.check_tokenizer(tokenizer_fingerprint(tokenizer))
        base.check_format(recipe.format)
        return [replace(one, levels=tuple((-base.target_logp(one)).tolist())) for one in forget]
    if anchors and teacher is not None:
        return with_levels(forget, anchors, [-teacher.target_logp(one) for one in anchors])
    log_line(
        f"warning: without --anchor or --base-cache nothing says what unseen text costs: every token counts as "
        f"forgotten at {recipe.level} nats."
    )
    return list(forget)


def _substitutes(
    forget: Sequence[EncodedExample],
    retain: Sequence[EncodedExample],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    limit: int,
    seed: int,
) -> list[EncodedExample] | None:
    """What the recipe puts in the place of each forget row's answer."""
    if recipe.substitute == "none":
        return None
    rows, others = [one.example for one in forget], [one.example for one in retain]
    chosen = refusals(rows) if recipe.substitute == "refusal" else random_answers(rows, others, seed)
    return encode(chosen, tokenizer, recipe.format, limit)


def _encode(
    path: str | Path,
    stem: str,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    limit: int,
    split: str | None = None,
) -> list[EncodedExample]:
    rows = read_rows(path, stem, split)
    return encode(rows, tokenizer, recipe.format, limit, append_eos=recipe.append_eos)


def _identity(command: str, recipe: Recipe, seed: int, device: torch.device) -> dict[str, Any]:
    """The part of a run's identity that every run has: with another one it would not end in the same weights."""
    parts = {"command": command, "recipe": asdict(recipe), "seed": seed, "device": device.type}
    return parts if world_size() == 1 else {**parts, "ranks": world_size()}


def _whole_on(device: torch.device) -> torch.device:
    """Where the student lies as a whole before it trains on `device`: in host memory where ranks share it out."""
    return device if world_size() == 1 else torch.device("cpu")


def _cache_digest(cache: TeacherCache | None) -> str:
    """SHA-256 of a cache's manifest, which names the SHA-256 of all else. A run's own follows from its other parts."""
    return "" if cache is None else file_sha256(cache.folder / MANIFEST)


def _train(loop: Loop, before: int, about: dict[str, Any]) -> dict[str, Any]:
    """Train, and put checkpoint and run.json in their place. `before` is the resident set before the model was
    loaded."""
    # A signal now waits for the end of the step, and behind the last step for the output.
    with loop.signals.deferred():
        run = {**about, **loop.train(), "versions": versions(), "made_from": digests(loop.work.identity)}
        peaks, state = run["peak_memory"], loop.state
        config = loop.trainer.student.model.config
        run["predicted_peak"] = predicted_peak(config, loop.trainer.recipe, state.largest, state.wanted, loop.device)
        of_ranks = all_gather_objects(peaks.get("allocated", peaks["process"] - before))
        run["measured_peak"] = max(of_ranks)
        if len(of_ranks) > 1:
            run["measured_peaks"] = of_ranks
        with loop.work.output_folder() as stage:
            loop.write(stage)
            if is_main_process():
                # By these names --overwrite tells a folder that this run wrote from one that holds more.
                run["files"] = sorted([*(path.name for path in stage.iterdir()), RUN])
                write_atomically(stage / RUN, json.dumps(nan_to_null(run), indent=1, allow_nan=False) + "\n")
    return run


def _raise_failure(run: dict[str, Any], out: str | Path) -> None:
    """Only once the output folder is in place: a loss that was no number ends the command, but keeps the checkpoint."""
    if run["failure"]:
        step = run["weights_of_step"]
        raise NekoLeanError(f"{run['failure']}; {out} holds the checkpoint of step {step}: lower lr and run again.")
