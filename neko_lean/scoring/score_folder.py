"""The work folder of a score in progress, from which an interrupted run resumes.

It lies next to the output and holds plan.json, which identifies the run, and generations.jsonl, to which each batch is
appended (generations-RANK.jsonl for other ranks). scores.json is written last; then the folder becomes the output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from neko_lean.distributed import is_main_process, rank, run_on_main_and_broadcast
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import json_object
from neko_lean.models import config_differences
from neko_lean.outputs import (
    Output,
    clear_work,
    empty_folder,
    explained_write_errors,
    keep_or_discard,
    locked,
    no_follow,
    open_work_folder,
    publish,
    refuse_occupied,
    refuse_strange_work,
    refuse_unfinished,
    refuse_unplanned,
    remove_replaced,
    restore_interrupted,
    sync_tree,
    unshare,
    write_atomically,
)
from neko_lean.scoring.generation import Generation

T = TypeVar("T")
PLAN = "plan.json"
SCORES = "scores.json"
GENERATIONS = "generations.jsonl"
PARTS = "generations*.jsonl"  # one file per rank
# The final generations.jsonl until scores.json is written, too: until then, resuming needs the ranks' own files.
ROWS = ".rows.tmp"
FINISHED = (SCORES, GENERATIONS, "documents.jsonl")


@contextmanager
def open_score_folder(output: Output, plan: Mapping[str, Any], *, resume: bool, quiet: bool) -> Iterator[Path]:
    """Yield the work folder, which becomes the output when the block ends without an error.

    On an error, the folder is kept if it holds generations, and removed otherwise. The main process creates and moves
    it.

    Args:
        output: the output and its work folder.
        plan: what the run computes; a resumed run must have the same.
        resume: continue an unfinished run.
        quiet: do not log how to continue.

    Raises:
        NekoLeanError: the output must not be replaced, another process is writing it, there is an unfinished run and
            `resume` is off, or that run has a different plan (the message names what differs).
    """

    def prepare() -> bool:
        refuse_existing(output, resume)
        _begin(output, plan, resume)
        return True

    def on_error(error: BaseException) -> None:
        has_generations = any(path.stat().st_size for path in output.work.glob(PARTS))
        keep_or_discard(output.work, error, "what was generated" if has_generations else None, quiet)

    with open_work_folder(output, prepare, on_error):
        with explained_write_errors(output.path):
            yield output.work
        run_on_main_and_broadcast(writing(output.work, lambda: _end(output)))


def writing(stage: Path, work: Callable[[], T]) -> Callable[[], T]:
    """Wrap `work`, which writes to the stage, so that an error such as a full disk names the output."""
    out = stage.with_name(stage.name.removeprefix(".").removesuffix(".partial"))
    return explained_write_errors(out)(work)


def refuse_existing(output: Output, resume: bool) -> None:
    """Raise NekoLeanError if there is an output or an unfinished run."""
    refuse_occupied(output)
    refuse_unfinished(output, resume)


def check_score_folder(output: Output, plan: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse what `open_score_folder` refuses, without the lock and without any change, for a dry run."""
    refuse_existing(output, resume)
    refuse_strange_work(output)
    if resume and (output.work / PLAN).is_file():
        _refuse_other_plan(output.work, plan)


def _begin(output: Output, plan: Mapping[str, Any], resume: bool) -> None:
    """Write the plan to a new work folder, or compare it with the plan of an existing one."""
    stage = output.work
    refuse_strange_work(output)
    if not resume:
        clear_work(output)
    stage.mkdir(exist_ok=True)

    path = stage / PLAN
    if path.is_file():
        _refuse_other_plan(stage, plan)
    else:
        refuse_unplanned(stage, PLAN)

    # Only now remove what an attack or an interrupted write left behind.
    parts = {part.name for part in stage.glob(PARTS)}
    empty_folder(stage, keep=lambda name: name == PLAN or name in parts)
    write_atomically(path, json.dumps(plan, indent=1) + "\n")


def _refuse_other_plan(stage: Path, plan: Mapping[str, Any]) -> None:
    """Raise NekoLeanError if the work folder's plan is damaged or differs from `plan`."""
    stored = _stored_plan(stage)
    if stored is None:
        raise NekoLeanError(f"{stage / PLAN} is damaged, so the run cannot be resumed: start anew with --overwrite.")
    changed = plan_differences(stored, plan)
    if changed:
        raise NekoLeanError(
            f"{stage} belongs to a run with another {', '.join(changed)}: use the same again, or start anew with "
            f"--overwrite."
        )


def _stored_plan(stage: Path) -> dict[str, Any] | None:
    """The plan in a work folder, or None if there is none that can be read."""
    try:
        return json_object(stage / PLAN)
    except FileNotFoundError:
        return None


def plan_differences(stored: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """The names of the values in which two plans differ; for the model's config, its keys with both values."""
    changed = sorted(key for key in {*stored, *plan} if stored.get(key) != plan.get(key))
    old, new = stored.get("config"), plan.get("config")
    if old != new and isinstance(old, dict) and isinstance(new, dict):
        changed.remove("config")
        changed += config_differences(old, new)
    return changed


def _end(output: Output) -> None:
    """Remove everything but the results, and move the work folder to the output."""
    stage = output.work
    if (stage / ROWS).is_file():
        (stage / ROWS).replace(stage / GENERATIONS)
    empty_folder(stage, keep=FINISHED.__contains__)
    sync_tree(stage)
    publish(stage, output)


def write_result(stage: Path, scores: str, lines: str) -> None:
    """Write the texts of scores.json and generations.jsonl to the stage."""
    write_atomically(stage / ROWS, lines)
    write_atomically(stage / SCORES, scores)


def finished_score(
    output: Output, made_from: str, plan: Mapping[str, Any], *, dry_run: bool = False
) -> dict[str, Any] | None:
    """The scores of this very run if it is already complete, at the output or still in the work folder.

    A complete work folder is moved to the output. The work folder of an unfinished run with the same plan is removed;
    that of another run is kept. A dry run moves and removes nothing.

    Raises:
        NekoLeanError: another process is writing the output, or the move fails.
    """

    def find() -> dict[str, Any] | None:
        found = _scores(output.path, made_from) or _scores(output.work, made_from)
        if found is None or dry_run:
            return found
        with locked(output), explained_write_errors(output.path):
            restore_interrupted(output)
            if _scores(output.path, made_from) is None:
                if _scores(output.work, made_from) is None:
                    return None  # another run replaced it in the meantime
                refuse_occupied(output)
                refuse_strange_work(output)
                _end(output)
            remove_replaced(output)
            stored = _stored_plan(output.work)
            if stored is not None and not plan_differences(stored, plan):
                clear_work(output)  # the same run, begun a second time
            return _scores(output.path, made_from)

    return run_on_main_and_broadcast(find)


def _scores(folder: Path, made_from: str) -> dict[str, Any] | None:
    """The folder's scores.json if it was made from these inputs, else None."""
    try:
        scores = json_object(folder / SCORES)
    except OSError:
        return None
    return scores if scores is not None and scores.get("made_from") == made_from else None


def read_generations(stage: Path) -> dict[int, Generation]:
    """The generations of an earlier run with any number of ranks, by row index.

    An incomplete last line is ignored and truncated on disk, so only one rank may call this, while none writes.
    """
    return {index: generation for path in sorted(stage.glob(PARTS)) for index, generation in _read_part(path).items()}


def _read_part(path: Path) -> dict[int, Generation]:
    generations: dict[int, Generation] = {}
    size = 0  # of the complete lines, in bytes
    with path.open("rb") as lines:
        for line in lines:
            try:
                values = json.loads(line)
                index = values.pop("row")
                generation = Generation(**values)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                break
            if not line.endswith(b"\n"):
                break
            generations[index] = generation
            size += len(line)
    unshare(path)
    if path.stat().st_size != size:
        with open(path, "r+b", opener=no_follow) as file:
            file.truncate(size)
    return generations


def add_generations(stage: Path, batch: Sequence[tuple[int, Generation]]) -> None:
    """Append a batch to this rank's file; it is on disk when this returns."""
    path = stage / (GENERATIONS if is_main_process() else f"generations-{rank()}.jsonl")
    with open(path, "a", encoding="utf-8", opener=no_follow) as file:
        for index, generation in batch:
            file.write(json.dumps({"row": index, **asdict(generation)}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
