"""Run the teacher once over the retain set and write its top-k probabilities, shard by shard.

The plan, which assigns examples to shards, is written before the teacher runs. A run that was killed continues at its
first missing shard, and ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neko_lean import __version__
from neko_lean.cache.format import SELF_GENERATED, Manifest
from neko_lean.cache.manifest import read_manifest, validate_plan
from neko_lean.cache.planning import (
    CacheData,
    CacheExamples,
    ShardJobs,
    encode_cache_data,
    plan_shards,
    read_cache_data,
    validate_options,
)
from neko_lean.cache.records import is_written, write_shard
from neko_lean.cache.self_generation import self_generated_ids, self_generated_rows
from neko_lean.cache.stage import PLAN, open_stage, publish_stage, refuse_existing, refuse_other_plan
from neko_lean.cache.teacher import target_logps, top_k_entries
from neko_lean.data import (
    EncodedExample,
    Example,
    PromptFormat,
    RowSource,
    describe_rows,
    find_format,
    log_truncation,
    paths_among,
    read_jsonl,
    read_rows,
    require_hub_package,
)
from neko_lean.distributed import items_of_rank, raise_on_any_rank, run_on_main_and_broadcast, with_process_group
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import jsonl_text
from neko_lean.models import (
    CausalLM,
    Model,
    ModelIdentity,
    accepts_loaded_model,
    check_seed,
    identify,
    load_config,
    load_model,
    load_tokenizer,
    model_folder,
    model_name,
    pick_device,
    pick_dtype,
    refuse_unknown_examples,
    usable_length,
)
from neko_lean.options import CacheOptions, OutputOptions
from neko_lean.outputs import MANIFEST, Output, claim_folder, explained_write_errors, write_atomically
from neko_lean.terminal import log_line, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_POSITIONS = 2**20  # shots may fill a model without a limit so far

LOW_MASS = 0.9  # below this mean captured probability, the KL says little about single tokens


@with_process_group()
@accepts_loaded_model
def cache_teacher(
    model: Model,
    out: str | Path,
    *,
    retain: RowSource | None = None,
    forget: RowSource | None = None,
    anchor: RowSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache: CacheOptions = CacheOptions(),
    run: OutputOptions = OutputOptions(),
) -> Manifest:
    """Write the teacher cache of a model over a retain set.

    Under torchrun, the ranks divide the shards among themselves and write the same bytes as a single process.

    Args:
        model: the teacher: a checkpoint folder, a hub name (owner/name or owner/name@revision), or a loaded model.
        out: folder to write. It appears only when it is complete.
        retain: the retain set, as for `read_rows`: a file, a folder with `retain.*`, a list of dicts, a DataFrame or a
            Dataset. With `cache.self_generated` it is None: the teacher then writes the rows, which the cache keeps in
            self_generated.jsonl. It may also be None with `forget`, for a recipe without a retain objective.
        forget: like `retain`, with `forget.*`. Adds what npo, dpo, undial and edited need: the top-k probabilities of
            these examples, and the teacher's log-probability of every token of them and of a refusal to each of them.
            Self-generated rows do not repeat them.
        anchor: what the teacher never saw, as for `read_anchor`. It joins the retain set, documents without a prompt
            format, and the teacher's log-probability of each of its tokens is added.
        tokenizer: the tokenizer of a loaded model.
        cache: what the teacher runs in, and how much of its output is stored.
        run: device, and how to treat an existing output or an unfinished run. Resuming a complete cache of the same
            settings does nothing.

    Returns:
        The manifest of the cache; of a dry run, the manifest before the teacher has run.

    Raises:
        NekoLeanError: for bad input, a full disk, or if `out` may not be replaced.

    Example::

        from neko_lean.cache import CacheOptions, cache_teacher

        manifest = cache_teacher("allenai/OLMo-1B-0724-hf", "cache/", retain="data/", cache=CacheOptions(top_k=128))
    """
    # Check everything that can be checked before the teacher is loaded.
    validate_options(cache)
    _check_retain_set(retain, forget, cache)
    require_hub_package(retain, forget)
    device, dtype = pick_device(run.device), pick_dtype(cache.dtype)
    claim = partial(claim_folder, out, "partial", overwrite=run.overwrite, resume=run.resume)
    claim(paths_among(model, retain, forget, anchor))
    data = read_cache_data(retain, forget, anchor, cache)
    folder = model_folder(model)
    output = claim([folder, *paths_among(retain, forget, anchor)])
    run_on_main_and_broadcast(lambda: refuse_existing(output, run.resume, locks=not run.dry_run))

    # Load the teacher, let it write the retain set if there is none, and tokenize.
    tokenizer = load_tokenizer(folder)
    limit = usable_length(folder, cache.max_length)
    prompts = find_format(cache.format, tokenizer, cache.system)
    for name, rows in (("retain", data.retain), ("forget", data.forget)):
        if rows:
            log_line(describe_rows(rows, name), run.quiet)
    log_line(f"prompt format: {prompts.label}", run.quiet)
    if run.dry_run:
        return _dry_run(model_name(model), folder, output, data, tokenizer, prompts, cache, run)
    teacher = load_model(folder, dtype, device)
    teacher.model.eval()
    own_rows = None
    if cache.self_generated:
        own_rows = run_on_main_and_broadcast(
            lambda: _self_generated(output, teacher, tokenizer, prompts, data.forget, cache, limit, run)
        )
        data = replace(data, retain=read_rows(own_rows))
    examples = encode_cache_data(data, tokenizer, prompts, limit, cache.shots, _positions(folder, cache))
    refuse_unknown_examples(examples.all, teacher)

    # Plan, and say how many examples are truncated.
    jobs = plan_shards(examples, cache.batch_tokens)
    identity, vocab_size = identify(folder, tokenizer), teacher.head.shape[0]
    cache = replace(cache, format=prompts.name)
    plan = validate_plan(_plan_manifest(model_name(model), identity, vocab_size, cache, examples, jobs))
    log_truncation(examples.all, limit, cache.max_length, run.quiet)

    manifest = _write_cache(output, plan, jobs, teacher, int(tokenizer.pad_token_id), own_rows, run)
    _warn_of_low_mass(manifest)
    return manifest


def _dry_run(
    name: str,
    folder: Path,
    output: Output,
    data: CacheData,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptFormat,
    cache: CacheOptions,
    run: OutputOptions,
) -> Manifest:
    """The manifest that a run would begin with, but without the rows that the teacher has yet to write."""
    limit = usable_length(folder, cache.max_length)
    examples = encode_cache_data(data, tokenizer, prompts, limit, cache.shots, _positions(folder, cache))
    jobs = plan_shards(examples, cache.batch_tokens)
    vocab_size = load_config(folder).get_text_config().vocab_size
    named = replace(cache, format=prompts.name)
    plan = _plan_manifest(name, identify(folder, tokenizer), vocab_size, named, examples, jobs)
    if run.resume and not cache.self_generated:
        refuse_other_plan(output, plan)
    log_truncation(examples.all, limit, cache.max_length, run.quiet)
    return plan


def _positions(folder: Path, cache: CacheOptions) -> int:
    """Positions of the teacher that shots may fill."""
    return usable_length(folder, MAX_POSITIONS) if cache.shots else 0


def _check_retain_set(retain: RowSource | None, forget: RowSource | None, cache: CacheOptions) -> None:
    """Raise NekoLeanError if there is nothing to cache, or two retain sets."""
    if retain is None and forget is None and not cache.self_generated:
        raise NekoLeanError(
            "RETAIN is missing: give the rows to preserve, or --self-generated N to let the teacher write them."
        )
    if retain is not None and cache.self_generated:
        raise NekoLeanError("--self-generated has no effect if a retain set is given; remove one of the two.")
    if cache.seed and not cache.self_generated:
        raise NekoLeanError("--seed has no effect without --self-generated; leave it out.")
    if cache.shots and (retain is None or forget is None):
        raise NekoLeanError(
            "--shots needs RETAIN, from which it takes examples, and --forget, whose questions they precede."
        )


def _self_generated(
    output: Output,
    teacher: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptFormat,
    forget: Sequence[Example],
    cache: CacheOptions,
    max_length: int,
    run: OutputOptions,
) -> list[dict[str, str]]:
    """The rows that the teacher writes. An interrupted run that is resumed reads those that it has written already."""
    check_seed(cache.seed)
    ids = self_generated_ids(cache.self_generated, cache.seed)
    for folder in (output.path, output.work) if run.resume else ():
        if (folder / SELF_GENERATED).is_file():
            rows = [record.values for record in read_jsonl(folder / SELF_GENERATED)]
            if [row.get("id") for row in rows] == ids:
                return rows
    return self_generated_rows(
        teacher,
        tokenizer,
        prompts,
        cache.self_generated,
        max_length=max_length,
        seed=cache.seed,
        forget=forget,
        quiet=run.quiet,
    )


def _write_cache(
    output: Output,
    plan: Manifest,
    jobs: ShardJobs,
    teacher: CausalLM,
    pad_id: int,
    own_rows: Sequence[Mapping[str, str]] | None,
    run: OutputOptions,
) -> Manifest:
    """Write and publish the shards of a plan, unless the output is complete, and return its manifest."""
    with open_stage(output, plan, run.resume) as stage:
        if stage is not None:
            explained = explained_write_errors(output.path)
            if own_rows is not None:
                text = jsonl_text(own_rows)
                run_on_main_and_broadcast(explained(lambda: write_atomically(stage / SELF_GENERATED, text)))
            raise_on_any_rank(explained(lambda: _write_shards(stage, plan, jobs, teacher, pad_id, run.quiet)))
            run_on_main_and_broadcast(explained(lambda: publish_stage(stage, plan, output)))
        # Every rank reads the manifest before the lock is released. After that, another run may replace the output.
        return _read_on_all_ranks(output.path / MANIFEST)


def _warn_of_low_mass(manifest: Manifest) -> None:
    if manifest.mean_mass < LOW_MASS:
        log_line(
            f"warning: the KL will say little about single tokens, because the entries hold only "
            f"{manifest.mean_mass:.3f} of the teacher's probability on average: raise --top-k (now {manifest.top_k}) "
            f"or --mass (now {manifest.mass})."
        )


def _plan_manifest(
    name: str, identity: ModelIdentity, vocab_size: int, cache: CacheOptions, examples: CacheExamples, jobs: ShardJobs
) -> Manifest:
    """The manifest of a cache before anything is written."""
    return Manifest(
        written_by=__version__,
        model=name,
        weights=identity.weights,
        tokenizer=identity.tokenizer,
        config=identity.config,
        format=cache.format,
        max_length=cache.max_length,
        top_k=cache.top_k,
        mass=float(cache.mass),
        vocab_size=vocab_size,
        teacher_dtype=cache.dtype,
        batch_tokens=cache.batch_tokens,
        stored_dtype=cache.stored_dtype,
        shots=cache.shots,
        rows=len(examples.top_k),
        positions=sum(map(len, examples.top_k)),
        entries=0,
        truncated=sum(example.num_truncated > 0 for example in examples.top_k),
        mean_mass=0.0,
        shards=[job.shard for job in jobs.top_k],
        forget_shards=[job.shard for job in jobs.targets],
    )


def _write_shards(stage: Path, plan: Manifest, jobs: ShardJobs, teacher: CausalLM, pad_id: int, quiet: bool) -> None:
    """Write this rank's part of the shards, except those that an earlier run has written."""
    if not (stage / PLAN).is_file():  # all shards are complete, and only the move to the output's path is missing
        return

    def top_k_tensors(batches: Sequence[Sequence[EncodedExample]]) -> dict[str, np.ndarray]:
        return _top_k_tensors(teacher, batches, plan, pad_id)

    def target_tensors(batches: Sequence[Sequence[EncodedExample]]) -> dict[str, np.ndarray]:
        return {"target_logp": np.concatenate([target_logps(teacher, batch, pad_id) for batch in batches])}

    # Examples get longer from the first shard to the last, so every n-th shard makes an even share.
    all_jobs = [*((job, top_k_tensors) for job in jobs.top_k), *((job, target_tensors) for job in jobs.targets)]
    own_jobs = items_of_rank(all_jobs)
    with progress_bar("cache-teacher", sum(job.num_tokens for job, _ in own_jobs), "tokens", quiet) as progress:
        for job, compute_tensors in own_jobs:
            if not is_written(stage, job.shard):
                write_shard(stage, job.shard, compute_tensors(job.batches))
            progress.advance(job.num_tokens)


def _top_k_tensors(
    teacher: CausalLM, batches: Sequence[Sequence[EncodedExample]], plan: Manifest, pad_id: int
) -> dict[str, np.ndarray]:
    """The tensors of a retain shard."""
    parts = [top_k_entries(teacher, batch, pad_id, plan.top_k, plan.mass, plan.stored_dtype) for batch in batches]
    return {
        "offsets": np.concatenate([np.zeros(1, np.int64), *(part.counts for part in parts)]).cumsum(),
        "ids": np.concatenate([part.ids for part in parts]),
        "scaled_p": np.concatenate([part.scaled_p for part in parts]),
        "tail_logp": np.concatenate([part.tail_logp for part in parts]),
    }


def _read_on_all_ranks(path: Path) -> Manifest:
    """Read a manifest on every rank, and raise on all ranks if one cannot."""
    manifests: list[Manifest] = []
    raise_on_any_rank(lambda: manifests.append(read_manifest(path)))
    return manifests[0]
