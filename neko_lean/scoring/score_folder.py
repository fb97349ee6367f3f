"""Where a score lies while it is being made: a folder next to the output, from which a killed run continues.

It holds plan.json, what the run was begun with, and generations.jsonl, to which each batch is added as it is made.
Under torchrun that is the first rank's, and each other one has its own, generations-RANK.jsonl. scores.json is written
last; a folder that holds it only has to be moved to its place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from neko_lean.distributed import is_main_process, rank, require_shared_folder, run_on_main_and_broadcast
from neko_lean.errors import NekoLeanError, UnpublishedError
from neko_lean.jsonio import json_object
from neko_lean.models import config_differences
from neko_lean.outputs import (
    Output,
    clear_work,
    empty_folder,
    explained_write_errors,
    locked,
    no_follow,
    publish,
    refuse_occupied,
    refuse_strange_work,
    refuse_unfinished,
    refuse_unplanned,
    remove_replaced,
    remove_tree,
    restore_interrupted,
    sync_tree,
    unshare,
    working_in,
    write_atomically,
)
from neko_lean.scoring.generation import Generation
from neko_lean.terminal import log_line

T = TypeVar("T")


PLAN = "plan.json"


SCORES = "scores.json"


GENERATIONS = "generations.jsonl"


PARTS = "generations*.jsonl"  # the ranks' own


# The output's generations.jsonl, until scores.json is written too: before that the run could not continue without the
# other one.
ROWS = ".rows.tmp"


FINISHED = (SCORES, GENERATIONS, "documents.jsonl")


@contextmanager
def open_score_folder(output: Output, plan: Mapping[str, Any], *, resume: bool, quiet: bool) -> Iterator[Path]:
    """Yield the folder to work in; it becomes the output when the block ends well. On an error it is kept if there are
    generations in it, and removed otherwise. The first rank makes it and moves it.

    Raises NekoLeanError when the output may not be replaced, when another process is writing it, when an unfinished
    run is in the way and `resume` is off, or when that run was begun with another `plan`, naming what differs.
    """
    stage = output.work
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(locked(output))
            with explained_write_errors(output.path):
                restore_interrupted(output)
                refuse_what_is_there(output, resume)
                _begin(output, plan, resume)

        run_on_main_and_broadcast(begin)
        require_shared_folder(stage)
        held.enter_context(working_in(stage))
        try:
            with explained_write_errors(output.path):
                yield stage
            run_on_main_and_broadcast(writing(stage, lambda: _end(output)))
        except BaseException as error:
            if not is_main_process() or isinstance(error, UnpublishedError):
                raise
            if any(path.stat().st_size for path in stage.glob(PARTS)):
                log_line(f"{stage} keeps what was generated: continue with --resume.", quiet)
            else:
                with suppress(OSError):
                    remove_tree(stage)
            raise


def writing(stage: Path, work: Callable[[], T]) -> Callable[[], T]:
    """`work`, which writes to the stage, for `agreed`: a full disk is a sentence about the output already in it."""
    out = stage.with_name(stage.name.removeprefix(".").removesuffix(".partial"))
    return explained_write_errors(out)(work)


def refuse_what_is_there(output: Output, resume: bool) -> None:
    """Raise NekoLeanError where an output or an unfinished run is in the way."""
    refuse_occupied(output)
    refuse_unfinished(output, resume)


def _begin(output: Output, plan: Mapping[str, Any], resume: bool) -> None:
    """Write the plan into a new folder, or compare it with the one that is there; only then is that tidied."""
    stage = output.work
    refuse_strange_work(output)
    if not resume:
        clear_work(output)
    stage.mkdir(exist_ok=True)
    path = stage / PLAN
    if path.is_file():
        begun = _begun(stage)
        if begun is None:
            raise NekoLeanError(f"{path} is damaged, so nobody can say what was begun: start anew with --overwrite.")
        changed = plan_differences(begun, plan)
        if changed:
            raise NekoLeanError(
                f"{stage} was begun with another {', '.join(changed)}: give the same again, or start anew with "
                f"--overwrite."
            )
    else:
        refuse_unplanned(stage, PLAN)
    # Left by an attack, or by a write that was cut off.
    parts = {part.name for part in stage.glob(PARTS)}
    empty_folder(stage, keep=lambda name: name == PLAN or name in parts)
    write_atomically(path, json.dumps(plan, indent=1) + "\n")


def _begun(stage: Path) -> dict[str, Any] | None:
    """The plan in a work folder, where there is one that can be read."""
    try:
        return json_object(stage / PLAN)
    except FileNotFoundError:
        return None


def plan_differences(begun: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """What two plans differ in, by name; of the model's config, its keys with both values."""
    changed = sorted(key for key in {*begun, *plan} if begun.get(key) != plan.get(key))
    old, new = begun.get("config"), plan.get("config")
    if old != new and isinstance(old, dict) and isinstance(new, dict):
        changed.remove("config")
        changed += config_differences(old, new)
    return changed


def _end(output: Output) -> None:
    """Leave nothing but what was asked for, and move it to its place."""
    stage = output.work
    if (stage / ROWS).is_file():
        (stage / ROWS).replace(stage / GENERATIONS)
    empty_folder(stage, keep=FINISHED.__contains__)
    sync_tree(stage)
    publish(stage, output)


def write_result(stage: Path, scores: str, lines: str) -> None:
    """Write scores.json and the rows of generations.jsonl to the stage, of which `unfinished` makes the output."""
    write_atomically(stage / ROWS, lines)
    write_atomically(stage / SCORES, scores)


def made_from(plan: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides a score, by which a finished one is told from another's."""
    return hashlib.sha256(json.dumps([plan, options], sort_keys=True).encode()).hexdigest()


def finished_score(output: Output, made: str, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scores of this very run if it is complete already: in its place, or in its work folder, from where it is
    moved there now. The work folder of a run with this plan is removed; another run's stays.

    Raises NekoLeanError when another process is writing the output, or when the move fails."""

    def look() -> dict[str, Any] | None:
        if _scores(output.path, made) is None and _scores(output.work, made) is None:
            return None
        with locked(output), explained_write_errors(output.path):
            restore_interrupted(output)
            if _scores(output.path, made) is None:
                if _scores(output.work, made) is None:
                    return None  # another run came in between
                refuse_occupied(output)
                refuse_strange_work(output)
                _end(output)
            remove_replaced(output)
            begun = _begun(output.work)
            if begun is not None and not plan_differences(begun, plan):
                clear_work(output)  # it began again what is complete
            return _scores(output.path, made)

    return run_on_main_and_broadcast(look)


def _scores(folder: Path, made: str) -> dict[str, Any] | None:
    try:
        found = json_object(folder / SCORES)
    except OSError:
        return None
    return found if found is not None and found.get("made_from") == made else None


def read_generations(stage: Path) -> dict[int, Generation]:
    """What an earlier run generated, by the row's number, with however many ranks. A last line that was cut off is
    dropped, here and on disk, so that only one rank may read and none write meanwhile."""
    return {number: one for path in sorted(stage.glob(PARTS)) for number, one in _read_part(path).items()}


def _read_part(path: Path) -> dict[int, Generation]:
    found: dict[int, Generation] = {}
    whole = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                raw = json.loads(line)
                number = raw.pop("row")
                one = Generation(**raw)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                break
            if not line.endswith(b"\n"):
                break
            found[number] = one
            whole += len(line)
    unshare(path)
    if path.stat().st_size != whole:
        with open(path, "r+b", opener=no_follow) as file:
            file.truncate(whole)
    return found


def add_generations(stage: Path, batch: Sequence[tuple[int, Generation]]) -> None:
    """Append a batch to this rank's file; it is on disk when this returns."""
    path = stage / (GENERATIONS if is_main_process() else f"generations-{rank()}.jsonl")
    with open(path, "a", encoding="utf-8", opener=no_follow) as file:
        for number, one in batch:
            file.write(json.dumps({"row": number, **asdict(one)}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
