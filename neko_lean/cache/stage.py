"""The work folder of a cache that is being written: started or resumed by its plan, and published when complete.

The folder contains plan.json, the shards that are complete, and a record of each; FORMAT.md describes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from neko_lean.cache.format import SELF_GENERATED, Manifest, Shard, differences, without_results
from neko_lean.cache.manifest import read_manifest, write_manifest
from neko_lean.cache.reader import TeacherCache
from neko_lean.cache.records import ShardRecord, read_record, record_path
from neko_lean.errors import CacheError
from neko_lean.outputs import (
    MANIFEST,
    Output,
    clear_work,
    empty_folder,
    explained_write_errors,
    keep_or_discard,
    locked,
    open_work_folder,
    publish,
    refuse_occupied,
    refuse_strange_work,
    refuse_unfinished,
    refuse_unplanned,
    remove_replaced,
    sync,
)
from neko_lean.terminal import log_line

PLAN = "plan.json"


def refuse_existing(output: Output, resume: bool, *, locks: bool = True) -> None:
    """Raise NekoLeanError, before the teacher is loaded, if an output or another process is in the way.

    Without `locks`, for a dry run, nothing is written, and another process is not noticed.
    """
    with locked(output) if locks else nullcontext(), explained_write_errors(output.path):
        if not (resume and (output.path / MANIFEST).is_file()):
            refuse_occupied(output)
        refuse_unfinished(output, resume)


@contextmanager
def open_stage(output: Output, plan: Manifest, resume: bool) -> Iterator[Path | None]:
    """Hold the work folder of a cache, and the output's lock, while the block runs.

    If the block fails, the folder is kept if it contains a complete shard, and removed otherwise. An existing work
    folder is changed only if it belongs to the same plan, or if `resume` is off.

    Args:
        output: the claimed output.
        plan: what the cache will contain.
        resume: continue the run that left the work folder.

    Yields:
        The work folder, or None if `resume` finds that the output is complete.

    Raises:
        CacheError: if the work folder or the output belongs to another plan.
        NekoLeanError: if an output, an unfinished run or another process is in the way.
    """

    def prepare() -> bool:
        # Check now, under the lock: another run may have completed or replaced the output.
        if resume and _is_complete(output, plan):
            remove_replaced(output)
            _remove_own_stage(output, plan)
            return False
        refuse_occupied(output)
        refuse_unfinished(output, resume)
        refuse_strange_work(output)
        _begin(output, plan, resume)
        return True

    def on_error(error: BaseException) -> None:
        has_shards = any(output.work.glob("*.safetensors"))
        keep_or_discard(output.work, error, "the shards that are complete" if has_shards else None)

    with open_work_folder(output, prepare, on_error) as has_work:
        yield output.work if has_work else None


def _is_complete(output: Output, plan: Manifest) -> bool:
    """Whether the output is the cache of this plan.

    Raises CacheError if it is the cache of another plan and may not be replaced.
    """
    path = output.path / MANIFEST
    if not path.is_file():
        return False
    try:
        manifest = read_manifest(path)
        _check_same_plan(plan, without_results(manifest), output.path)
    except CacheError:
        if output.overwrite:
            return False
        raise
    if manifest.config is None:
        log_line(
            f"warning: {output.path} is taken as complete by its weights alone, because caches of format 1 do not "
            f"record the config.json; run again with --overwrite to be sure."
        )
    return True


def refuse_other_plan(output: Output, plan: Manifest) -> None:
    """Raise CacheError, without any change, if a resumed run would find the output or a work folder of another plan."""
    if not _is_complete(output, plan) and (output.work / PLAN).is_file():
        _check_same_plan(plan, read_manifest(output.work / PLAN), output.work)


def _remove_own_stage(output: Output, plan: Manifest) -> None:
    """Remove a work folder of the same plan, whose output is complete. The work folder of another plan is kept."""
    for name in (PLAN, MANIFEST):
        if (output.work / name).is_file():
            if not differences(plan, without_results(read_manifest(output.work / name))):
                clear_work(output)
            return


def _begin(output: Output, plan: Manifest, resume: bool) -> None:
    """Create the work folder, or check that the existing one belongs to the same plan and then tidy it."""
    stage = output.work
    if not resume:
        clear_work(output)
    stage.mkdir(exist_ok=True)

    has_plan, has_manifest = (stage / PLAN).is_file(), (stage / MANIFEST).is_file()
    if has_plan:
        _check_same_plan(plan, read_manifest(stage / PLAN), stage)
    elif has_manifest:  # the run was killed between its last shard and the move to the output's path
        _check_same_plan(plan, without_results(read_manifest(stage / MANIFEST)), stage)
    else:
        refuse_unplanned(stage, PLAN)

    known = {PLAN, MANIFEST, SELF_GENERATED}
    for shard in plan.all_shards:
        known |= {shard.file, record_path(stage, shard).name}
    empty_folder(stage, keep=known.__contains__)
    if not has_plan and not has_manifest:
        write_manifest(stage / PLAN, plan)


def _check_same_plan(plan: Manifest, existing: Manifest, folder: Path) -> None:
    changed = differences(existing, plan)
    if changed:
        raise CacheError(
            f"{folder} was begun with another {', '.join(changed)}: give the same again, or start anew with "
            f"--overwrite."
        )


def publish_stage(stage: Path, plan: Manifest, output: Output) -> None:
    """Read back a cache whose shards are all written, and move it to the output's path.

    Raises:
        CacheError: if the files are not what was written. All shards will then be written again.
        UnpublishedError: if the folder cannot be moved.
    """
    if (stage / PLAN).is_file():
        write_manifest(stage / MANIFEST, _completed(plan, stage))
    for shard in plan.all_shards:
        record_path(stage, shard).unlink(missing_ok=True)
    (stage / PLAN).unlink(missing_ok=True)
    sync(stage)

    try:
        TeacherCache(stage).verify()
    except CacheError:
        write_manifest(stage / PLAN, plan)
        (stage / MANIFEST).unlink()
        raise
    publish(stage, output)


def _completed(plan: Manifest, stage: Path) -> Manifest:
    """The manifest of a plan whose shards are all written. Raises CacheError if a record is missing."""
    records = [read_record(stage, shard) for shard in plan.shards]
    forget_records = [read_record(stage, shard) for shard in plan.forget_shards]

    captured = 0.0
    for record in records:  # not sum(), whose rounding depends on the Python version
        captured += record.captured
    return replace(
        plan,
        entries=sum(record.entries for record in records),
        mean_mass=captured / plan.positions,
        shards=_with_checksums(plan.shards, records),
        forget_shards=_with_checksums(plan.forget_shards, forget_records),
    )


def _with_checksums(shards: Sequence[Shard], records: Sequence[ShardRecord]) -> list[Shard]:
    return [
        replace(shard, bytes=record.bytes, sha256=record.sha256) for shard, record in zip(shards, records, strict=True)
    ]
