"""Where a score lies while it is being made: a folder beside the output that a killed run goes on from.

It holds plan.json, what the run was begun with, and generations.jsonl, to which each batch is added as it is made.
Under torchrun that is the first rank's, and each other one has its own, generations-RANK.jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from neko_lean.collective import by_first, refuse_unseen
from neko_lean.errors import NekoLeanError, explained_write_errors, publish, refuse_occupied, refuse_unfinished
from neko_lean.progress import say
from neko_lean.ranks import leads, rank
from neko_lean.scoring.generation import Generation

T = TypeVar("T")
PLAN = "plan.json"
GENERATIONS = "generations.jsonl"
PARTS = "generations*.jsonl"  # the ranks' own


@contextmanager
def unfinished(out: Path, plan: Mapping[str, Any], *, resume: bool, overwrite: bool, quiet: bool) -> Iterator[Path]:
    """Yield the folder to work in; it becomes `out` when the block ends well. On an error it is kept where there are
    generations in it, and removed otherwise. The first rank makes it and moves it.

    Raises NekoLeanError when `out` holds something, when an unfinished run is in the way and `resume` is off, or when
    that run was begun with another `plan`, naming what differs.
    """
    out = Path(out).absolute()
    stage = out.parent / f".{out.name}.partial"
    by_first(lambda: _refuse_or_clear(out, stage, resume, overwrite))
    with explained_write_errors(out):
        try:
            by_first(writing(stage, lambda: _begin(stage, plan)))
            refuse_unseen(stage)
            yield stage
            by_first(writing(stage, lambda: _end(stage, out)))
        except BaseException:
            if any(stage.glob(PARTS)):
                say(f"{stage} keeps what was generated: go on with --resume.", quiet)
            elif leads():
                shutil.rmtree(stage, ignore_errors=True)
            raise


def writing(stage: Path, work: Callable[[], T]) -> Callable[[], T]:
    """`work`, which writes to the stage, for `agreed`: a full disk is a sentence about the output already in it."""
    out = stage.with_name(stage.name.removeprefix(".").removesuffix(".partial"))
    return explained_write_errors(out)(work)


def _refuse_or_clear(out: Path, stage: Path, resume: bool, overwrite: bool) -> None:
    refuse_occupied(out, overwrite)
    refuse_unfinished(stage, resume, overwrite)


def _begin(stage: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan into a new folder, or compare it with the one that is there."""
    stage.mkdir(parents=True, exist_ok=True)
    for folder in filter(Path.is_dir, stage.iterdir()):  # of an attack that was killed
        shutil.rmtree(folder)
    path = stage / PLAN
    try:
        begun = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError):
        begun = None
    if not isinstance(begun, dict):  # killed before the plan was whole, hence before anything was generated
        for part in stage.glob(PARTS):
            part.unlink()
        path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        return
    changed = sorted(key for key in {*begun, *plan} if begun.get(key) != plan.get(key))
    if changed:
        raise NekoLeanError(
            f"{stage} was begun with another {', '.join(changed)}: give the same again, or start anew with --overwrite."
        )


def _end(stage: Path, out: Path) -> None:
    """Leave nothing but what was asked for, and move it to its place."""
    for path in (stage / PLAN, *stage.glob(PARTS)):
        if path.name != GENERATIONS:
            path.unlink()
    publish(stage, out)


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
    os.truncate(path, whole)
    return found


def add_generations(stage: Path, batch: Sequence[tuple[int, Generation]]) -> None:
    """Append a batch to this rank's file; it is on disk when this returns."""
    path = stage / (GENERATIONS if leads() else f"generations-{rank()}.jsonl")
    with path.open("a", encoding="utf-8") as file:
        for number, one in batch:
            file.write(json.dumps({"row": number, **asdict(one)}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
