"""Where a score lies while it is being made: a folder beside the output that a killed run goes on from.

It holds plan.json, what the run was begun with, and generations.jsonl, to which each batch is added as it is made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neko_lean.errors import NekoLeanError, explained_write_errors, publish, refuse_occupied, refuse_unfinished
from neko_lean.progress import say
from neko_lean.scoring.generation import Generation

PLAN = "plan.json"
GENERATIONS = "generations.jsonl"


@contextmanager
def unfinished(out: Path, plan: Mapping[str, Any], *, resume: bool, overwrite: bool, quiet: bool) -> Iterator[Path]:
    """Yield the folder to work in; it becomes `out` when the block ends well. On an error it is kept where there are
    generations in it, and removed otherwise.

    Raises NekoLeanError when `out` holds something, when an unfinished run is in the way and `resume` is off, or when
    that run was begun with another `plan`, naming what differs.
    """
    out = Path(out).absolute()
    stage = out.parent / f".{out.name}.partial"
    refuse_occupied(out, overwrite)
    refuse_unfinished(stage, resume, overwrite)
    with explained_write_errors(out):
        try:
            stage.mkdir(parents=True, exist_ok=True)
            _same_plan(stage, plan)
            yield stage
            (stage / PLAN).unlink()
            publish(stage, out)
        except BaseException:
            if (stage / GENERATIONS).is_file():
                say(f"{stage} keeps what was generated: go on with --resume.", quiet)
            else:
                shutil.rmtree(stage, ignore_errors=True)
            raise


def _same_plan(stage: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan into a new folder, or compare it with the one that is there."""
    path = stage / PLAN
    try:
        begun = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        begun = None
    if not isinstance(begun, dict):  # killed before the plan was whole, hence before anything was generated
        (stage / GENERATIONS).unlink(missing_ok=True)
        path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        return
    changed = sorted(key for key in {*begun, *plan} if begun.get(key) != plan.get(key))
    if changed:
        raise NekoLeanError(
            f"{stage} was begun with another {', '.join(changed)}: give the same again, or start anew with --overwrite."
        )


def read_generations(stage: Path) -> dict[int, Generation]:
    """What an earlier run generated, by the row's number. A last line that was cut off is dropped, here and on disk."""
    path = stage / GENERATIONS
    if not path.is_file():
        return {}
    found: dict[int, Generation] = {}
    whole = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                raw = json.loads(line)
                number = raw.pop("row")
                one = Generation(**raw)
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            if not line.endswith(b"\n"):
                break
            found[number] = one
            whole += len(line)
    os.truncate(path, whole)
    return found


def add_generations(stage: Path, batch: Sequence[tuple[int, Generation]]) -> None:
    """Append a batch; it is on disk when this returns."""
    with (stage / GENERATIONS).open("a", encoding="utf-8") as file:
        for number, one in batch:
            file.write(json.dumps({"row": number, **asdict(one)}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
