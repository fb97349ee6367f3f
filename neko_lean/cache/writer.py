"""Run the teacher once over the retain set and write its top-k probabilities, shard by shard.

Which rows go into which shard is decided before the teacher runs and written down as plan.json, so a run that was
killed goes on at its first missing shard and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from neko_lean import __version__
from neko_lean.cache.format import STORED, Manifest, Shard, differences, shard_name
from neko_lean.cache.manifest import checked, read_manifest, write_manifest
from neko_lean.cache.options import CacheOptions
from neko_lean.cache.reader import TeacherCache
from neko_lean.cache.teacher import keep
from neko_lean.data import (
    FORMATS,
    EncodedExample,
    encode,
    length_batches,
    position_warning,
    read_anchor,
    read_rows,
    refusals,
    truncation_summary,
)
from neko_lean.distributed import (
    is_main_process,
    items_of_rank,
    raise_on_any_rank,
    require_shared_folder,
    run_on_main_and_broadcast,
    with_process_group,
)
from neko_lean.errors import CacheError, NekoLeanError, UnpublishedError
from neko_lean.models import (
    CausalLM,
    identify,
    load_model,
    load_tokenizer,
    model_folder,
    model_name,
    next_token_logp,
    pick_device,
    pick_dtype,
    refuse_non_finite_outputs,
    refuse_unknown_examples,
    usable_length,
)
from neko_lean.options import OutputOptions
from neko_lean.outputs import (
    MANIFEST,
    Output,
    claim_folder,
    clear_work,
    empty_folder,
    explained_write_errors,
    file_sha256,
    locked,
    publish,
    refuse_occupied,
    refuse_strange_work,
    refuse_unfinished,
    refuse_unplanned,
    remove_replaced,
    remove_tree,
    restore_interrupted,
    sync,
    working_in,
    write_atomically,
)
from neko_lean.terminal import log_line, progress_bar

PLAN = "plan.json"


KEPT = ("ids", "scaled_p", "tail_logp")


_SHARD_FIELDS = ("shards", "forget_shards")


SHARD_POSITIONS = 2**16  # positions a shard holds before the next one begins: 17 MB at k = 64


Batch = list[EncodedExample]


LOW_MASS = 0.9  # below this much captured probability the KL says little about single tokens


@with_process_group()
def cache_teacher(
    model: str | Path,
    retain: str | Path,
    out: str | Path,
    *,
    forget: str | Path | None = None,
    anchor: str | Path | None = None,
    cache: CacheOptions = CacheOptions(),
    run: OutputOptions = OutputOptions(),
) -> Manifest:
    """Write the teacher cache of `model` over the rows of `retain` to the folder `out`.

    Args:
        model: checkpoint folder of the teacher, or hub name: owner/name or owner/name@revision.
        retain: parquet, jsonl or csv file, or a folder that holds `retain.*`.
        out: folder to write; it appears only when it is complete.
        forget: as `retain`; adds what npo, dpo and undial need: these rows' top-k, and the teacher's log-probability
            of every token of these rows and of a refusal in each one's place.
        anchor: jsonl file of neutral documents to hold still; they join the retain rows, without a template, and the
            teacher's log-probability of each of their tokens is added.
        cache: what the teacher runs in and how much of its output is stored.
        run: device, and what to do with an existing output or an unfinished run. Resuming a complete cache that has the
            same settings does nothing.

    Under torchrun the ranks share the shards out; the bytes are those of one process. Returns the manifest. Raises
    NekoLeanError for bad input, a full disk, or an `out` that holds something.
    """
    if cache.top_k < 1 or cache.max_length < 1 or cache.batch_tokens < 1:
        raise NekoLeanError("top_k, max_length and batch_tokens must be at least 1.")
    if not 0 < cache.mass <= 1:
        raise NekoLeanError(f"mass is {cache.mass}: it must be above 0 and at most 1.")
    if cache.stored_dtype not in STORED:
        raise NekoLeanError(f"stored_dtype {cache.stored_dtype!r} is not one of {', '.join(STORED)}.")
    if cache.format not in FORMATS:
        raise NekoLeanError(f"format {cache.format!r} is not one of {', '.join(FORMATS)}.")
    rows = read_rows(retain, "retain")
    anchor_rows = read_anchor(anchor) if anchor is not None else []
    forget_rows = read_rows(forget, "forget") if forget is not None else []
    place, precision, folder = pick_device(run.device), pick_dtype(cache.dtype), model_folder(model)
    inputs = [folder, retain, forget, anchor]
    output = claim_folder(out, "partial", inputs, overwrite=run.overwrite, resume=run.resume)
    run_on_main_and_broadcast(lambda: _refuse_what_is_there(output, run.resume))
    tokenizer = load_tokenizer(folder)
    pad_id = int(tokenizer.pad_token_id)
    limit = usable_length(folder, cache.max_length)
    kept = encode(rows, tokenizer, cache.format, limit)
    anchors = encode(anchor_rows, tokenizer, "plain", limit)
    forgotten = encode(forget_rows, tokenizer, cache.format, limit)
    refused = encode(refusals(forget_rows), tokenizer, cache.format, limit)
    sets = {"shard": _distinct(kept + anchors + forgotten), "forget": _distinct(forgotten + refused + anchors)}
    teacher = load_model(folder, precision, place)
    teacher.model.eval()
    refuse_unknown_examples([*sets["shard"], *sets["forget"]], teacher)
    jobs = {kind: _into_shards(teacher_batches(encoded, cache.batch_tokens)) for kind, encoded in sets.items()}
    identity = identify(folder, tokenizer)
    plan = Manifest(
        written_by=__version__,
        model=model_name(model),
        weights=identity.weights,
        tokenizer=identity.tokenizer,
        config=identity.config,
        format=cache.format,
        max_length=cache.max_length,
        top_k=cache.top_k,
        mass=float(cache.mass),
        vocab_size=teacher.head.shape[0],
        teacher_dtype=cache.dtype,
        batch_tokens=cache.batch_tokens,
        stored_dtype=cache.stored_dtype,
        rows=len(sets["shard"]),
        positions=sum(map(len, sets["shard"])),
        entries=0,
        truncated=sum(e.num_truncated > 0 for e in sets["shard"]),
        mean_mass=0.0,
        shards=_planned("shard", jobs["shard"]),
        forget_shards=_planned("forget", jobs["forget"]),
    )
    plan = checked(plan)
    everything = [*sets["shard"], *sets["forget"]]
    log_line(truncation_summary(everything, limit), run.quiet)
    if warning := position_warning(everything, limit, cache.max_length):
        log_line(warning)
    with _stage(output, plan, run.resume) as stage:
        if stage is not None:
            explained = explained_write_errors(output.path)
            raise_on_any_rank(explained(lambda: _write_shards(stage, plan, jobs, teacher, pad_id, run.quiet)))
            run_on_main_and_broadcast(explained(lambda: _end(stage, plan, output)))
        manifest = _read_on_all_ranks(output.path / MANIFEST)
    if manifest.mean_mass < LOW_MASS:
        log_line(
            f"warning: the entries hold {manifest.mean_mass:.3f} of the teacher's probability on average, so the KL "
            f"will know little about single tokens: raise --top-k (now {cache.top_k}) or --mass (now {cache.mass})."
        )
    return manifest


def teacher_batches(encoded: Sequence[EncodedExample], batch_tokens: int) -> list[Batch]:
    """Rows as batches of like length, shortest first; the same on every run."""
    lengths = [len(one) for one in encoded]
    batches = length_batches(lengths, max_rows=max(1, len(encoded)), max_tokens=batch_tokens)
    return [[encoded[i] for i in batch] for batch in batches]


def _distinct(encoded: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Rows that differ in id or text: one that is in both sets is cached once."""
    return list({(one.example.id, one.example.digest): one for one in encoded}.values())


def _into_shards(batches: Sequence[Batch]) -> list[list[Batch]]:
    shards: list[list[Batch]] = []
    waiting = 0
    for batch in batches:
        if not shards or waiting >= SHARD_POSITIONS:
            shards.append([])
            waiting = 0
        shards[-1].append(batch)
        waiting += sum(map(len, batch))
    return shards


def _rows(batches: Sequence[Batch]) -> list[EncodedExample]:
    return [one for batch in batches for one in batch]


def _planned(kind: str, jobs: Sequence[Sequence[Batch]]) -> list[Shard]:
    """The shards to come, their bytes and checksums still open. A forget row has a token less: its first has no
    log-probability."""
    less = kind == "forget"
    return [
        Shard(
            file=shard_name(kind, number, len(jobs)),
            bytes=0,
            sha256="",
            rows=[(one.example.id, len(one) - less, one.example.digest) for one in _rows(batches)],
        )
        for number, batches in enumerate(jobs)
    ]


def _refuse_what_is_there(output: Output, resume: bool) -> None:
    """Raise NekoLeanError, before the teacher is loaded, where something is in the way: another process, too."""
    with locked(output), explained_write_errors(output.path):
        if not (resume and (output.path / MANIFEST).is_file()):
            refuse_occupied(output)
        refuse_unfinished(output, resume)


def _is_complete(output: Output, plan: Manifest) -> bool:
    """Whether the output is the cache of this very plan. Raises CacheError where it is that of another one, unless that
    may be replaced."""
    path = output.path / MANIFEST
    if not path.is_file():
        return False
    try:
        found = read_manifest(path)
        _same_plan(plan, _without_results(found), output.path)
    except CacheError:
        if output.overwrite:
            return False
        raise
    if found.config is None:
        log_line(
            f"warning: {output.path} is taken as complete by its weights alone: it was made before caches said which "
            f"config.json they are of (format 1); make it anew with --overwrite to be sure."
        )
    return True


def _read_on_all_ranks(path: Path) -> Manifest:
    """The manifest, before the first rank may let go of the lock: after that another run may replace it."""
    found: dict[str, Manifest] = {}

    def read() -> None:
        found["manifest"] = read_manifest(path)

    raise_on_any_rank(read)
    return found["manifest"]


@contextmanager
def _stage(output: Output, plan: Manifest, resume: bool) -> Iterator[Path | None]:
    """The folder to write shards to, under the output's lock; None when `resume` finds the output complete.

    On an error it is kept and named if a shard in it is complete, and removed otherwise. What was there before is only
    touched once it has turned out to belong to the same plan.
    """
    stage = output.work
    with ExitStack() as held:

        def begin() -> bool:
            held.enter_context(locked(output))
            with explained_write_errors(output.path):
                restore_interrupted(output)
                # Only now: until the lock was held, another run may have completed or replaced it.
                if resume and _is_complete(output, plan):
                    remove_replaced(output)
                    _clear_own_work(output, plan)
                    return True
                refuse_occupied(output)
                refuse_unfinished(output, resume)
                refuse_strange_work(output)
                _begin(output, plan, resume)
                return False

        if run_on_main_and_broadcast(begin):
            yield None
            return
        require_shared_folder(stage)
        held.enter_context(working_in(stage))
        try:
            yield stage
        except BaseException as error:
            if isinstance(error, UnpublishedError) or not is_main_process():
                raise
            if any(stage.glob("*.safetensors")):
                log_line(f"{stage} keeps the shards that are complete: continue with --resume.")
            else:
                with suppress(OSError):
                    remove_tree(stage)
            raise


def _clear_own_work(output: Output, plan: Manifest) -> None:
    """With the output complete, remove the work folder of a run that began it again; another run's stays."""
    for name in (PLAN, MANIFEST):
        if (output.work / name).is_file():
            if not differences(plan, _without_results(read_manifest(output.work / name))):
                clear_work(output)
            return


def _begin(output: Output, plan: Manifest, resume: bool) -> None:
    """Make the stage folder, or make sure that the one there belongs to the same plan, and then tidy it."""
    stage = output.work
    if not resume:
        clear_work(output)
    stage.mkdir(exist_ok=True)
    if (stage / PLAN).is_file():
        _same_plan(plan, read_manifest(stage / PLAN), stage)
    elif (stage / MANIFEST).is_file():  # killed after the last shard: only the move to its place is missing
        _same_plan(plan, _without_results(read_manifest(stage / MANIFEST)), stage)
    else:
        refuse_unplanned(stage, PLAN)
    known = {PLAN, MANIFEST}
    for shard in (*plan.shards, *plan.forget_shards):
        known |= {shard.file, _record_path(stage, shard).name}
    empty_folder(stage, keep=known.__contains__)
    if not (stage / PLAN).is_file() and not (stage / MANIFEST).is_file():
        write_manifest(stage / PLAN, plan)


def _same_plan(plan: Manifest, found: Manifest, where: Path) -> None:
    changed = differences(found, plan)
    if changed:
        raise CacheError(
            f"{where} was begun with another {', '.join(changed)}: give the same again, or start anew with --overwrite."
        )


def _without_results(manifest: Manifest) -> Manifest:
    """The plan that a complete manifest came from."""
    bare = {name: [replace(s, bytes=0, sha256="") for s in getattr(manifest, name)] for name in _SHARD_FIELDS}
    return replace(manifest, entries=0, mean_mass=0.0, **bare)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Record:
    """What was written as a shard: taken from the bytes in memory, not from the file that has its name later."""

    bytes: int
    sha256: str
    entries: int = 0
    captured: float = 0.0  # sum over positions of the probability inside the entries


def _record_path(stage: Path, shard: Shard) -> Path:
    return stage / f"{shard.file}.json"


def _record(stage: Path, shard: Shard) -> Record:
    """The record of a shard that was written. Raises CacheError where there is none."""
    path = _record_path(stage, shard)
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, RecursionError) as error:
        raise CacheError(f"{path} does not say what was written as {shard.file}: run again with --resume.") from error


def _is_written(stage: Path, shard: Shard) -> bool:
    """Whether a shard is there and is what its record says was written."""
    path = stage / shard.file
    try:
        record = _record(stage, shard)
        return path.stat().st_size == record.bytes and file_sha256(path) == record.sha256
    except (FileNotFoundError, CacheError):
        return False


def _write_shards(
    stage: Path, plan: Manifest, jobs: Mapping[str, list[list[Batch]]], teacher: CausalLM, pad_id: int, quiet: bool
) -> None:
    """Write every shard of this rank's that is not there yet, each with its record after it."""
    work = [(shard, _retain_tensors, batches) for shard, batches in zip(plan.shards, jobs["shard"], strict=True)]
    work += [
        (shard, _forget_tensors, batches) for shard, batches in zip(plan.forget_shards, jobs["forget"], strict=True)
    ]
    if not (stage / PLAN).is_file():  # complete: only the move to its place is missing
        return
    work = list(items_of_rank(work))  # shards get longer rows from the first to the last
    total = sum(len(one) for _, _, batches in work for one in _rows(batches))
    with progress_bar("cache-teacher", total, "tokens", quiet) as progress:
        for shard, tensors_of, batches in work:
            if not _is_written(stage, shard):
                tensors = tensors_of(teacher, batches, plan, pad_id)
                data = save(tensors)
                write_atomically(stage / shard.file, data)
                record = Record(len(data), hashlib.sha256(data).hexdigest(), *_totals(tensors))
                write_atomically(_record_path(stage, shard), json.dumps(asdict(record)) + "\n")
            progress.advance(sum(map(len, _rows(batches))))


def _totals(tensors: Mapping[str, np.ndarray]) -> tuple[int, float]:
    """A retain shard's entries, and the probability inside them summed over positions; zeros for a forget shard."""
    if "ids" not in tensors:
        return 0, 0.0
    return len(tensors["ids"]), float(-np.expm1(tensors["tail_logp"].astype(np.float64)).sum())


def _end(stage: Path, plan: Manifest, output: Output) -> None:
    """With all shards written: read the cache back, and move it to its place.

    Raises CacheError when it is not what was written. Then no shard counts as written any more.
    """
    if (stage / PLAN).is_file():
        finish(stage, plan)
    for shard in (*plan.shards, *plan.forget_shards):
        _record_path(stage, shard).unlink(missing_ok=True)
    (stage / PLAN).unlink(missing_ok=True)
    sync(stage)
    try:
        TeacherCache(stage).verify()
    except CacheError:
        write_manifest(stage / PLAN, plan)
        (stage / MANIFEST).unlink()
        raise
    publish(stage, output)


def finish(stage: Path, plan: Manifest) -> Manifest:
    """Write manifest.json from the plan and the records of the shards. Raises CacheError where one is missing."""
    records = {name: [_record(stage, shard) for shard in getattr(plan, name)] for name in _SHARD_FIELDS}
    done = {
        name: [
            replace(shard, bytes=record.bytes, sha256=record.sha256)
            for shard, record in zip(getattr(plan, name), records[name], strict=True)
        ]
        for name in _SHARD_FIELDS
    }
    entries, captured = 0, 0.0
    for record in records["shards"]:
        entries, captured = entries + record.entries, captured + record.captured
    manifest = replace(plan, entries=entries, mean_mass=captured / plan.positions, **done)  # type: ignore[arg-type]
    write_manifest(stage / MANIFEST, manifest)
    return manifest


def _retain_tensors(teacher: CausalLM, batches: Sequence[Batch], plan: Manifest, pad_id: int) -> dict[str, np.ndarray]:
    parts = [keep(teacher, batch, pad_id, plan.top_k, plan.mass, plan.stored_dtype) for batch in batches]
    offsets = np.concatenate([np.zeros(1, np.int64), *(part.counts for part in parts)]).cumsum()
    tensors = {name: np.concatenate([getattr(part, name) for part in parts]) for name in KEPT}
    return {"offsets": offsets, **tensors}


def _forget_tensors(teacher: CausalLM, batches: Sequence[Batch], plan: Manifest, pad_id: int) -> dict[str, np.ndarray]:
    parts = []
    for batch in batches:
        logp = next_token_logp(teacher, [one.input_ids for one in batch], pad_id).cpu()  # [sum of (length - 1)]
        for one, own in zip(batch, logp.split([len(one) - 1 for one in batch]), strict=True):
            refuse_non_finite_outputs(own, f"row {one.example.id}")
        parts.append(logp.numpy())
    return {"target_logp": np.concatenate(parts)}
