"""Find the score folders and runs that a report is made of, and say which belong together.

An argument is what it holds: scores.json, a score folder; run.json, a folder of `unlearn`; neither, a folder of such
folders, as `neko-lean demo` writes. A run belongs to the scores of the model that lies in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from neko_lean.data import read_jsonl
from neko_lean.errors import NekoLeanError
from neko_lean.models import is_inside
from neko_lean.report.values import text

BEFORE = "before"


WANTED = "give folders that `neko-lean score` or `unlearn` wrote, or one that holds them"


@dataclass(frozen=True)
class Run:
    """What `unlearn` wrote about itself."""

    folder: Path
    about: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def unlearned(self) -> bool:
        """Whether it made a model forget, and not, as `memorize` does, learn."""
        return text(self.about, "command") != "memorize"


@dataclass(frozen=True)
class Scored:
    """One scored model: its scores, its generations, and the run that made it, where that is known."""

    folder: Path
    label: str
    scores: dict[str, Any]
    rows: list[dict[str, Any]]
    run: Run | None = None


@dataclass(frozen=True)
class Collected:
    """What a report shows: the model before, where one was scored, and those that came of it."""

    before: Scored | None
    after: list[Scored]

    @property
    def all(self) -> list[Scored]:
        """Before first."""
        return [*([self.before] if self.before else []), *self.after]


@dataclass
class _Found:
    scores: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)  # named on the command line: each must find its scores
    nearby: list[Path] = field(default_factory=list)  # met inside a named folder: may stay unused
    pairs: dict[Path, Path] = field(default_factory=dict)


def collect(paths: Sequence[str | Path], before: str | Path | None = None) -> Collected:
    """Read all score folders and runs among `paths` and match them.

    `before` names the scores of the model before. By default they are those of the model that the runs started from,
    or without runs the first of several. Raises NekoLeanError when a folder is no such folder, when there are no
    scores, or when a run's scores cannot be told.
    """
    found = _find(paths)
    first = _resolved(before) if before is not None else None
    if first is not None:
        if not (first / "scores.json").is_file():
            raise NekoLeanError(f"--before {before} holds no scores.json: give a folder that `neko-lean score` wrote.")
        if first not in found.scores:
            found.scores.insert(0, first)
    if not found.scores:
        raise NekoLeanError(f"{', '.join(map(str, paths))}: no scores among them; {WANTED}.")
    runs = {folder: _read_run(folder) for folder in [*found.runs, *found.nearby, *found.pairs.values()]}
    scored = [_read_scores(folder) for folder in found.scores]
    by_name = {folder.name: run for folder, run in reversed(runs.items())}
    scored = [
        replace(one, run=runs[found.pairs[one.folder]] if one.folder in found.pairs else by_name.get(_model(one)))
        for one in scored
    ]
    start = _before(scored, list(runs.values()), first)
    scored = _pair_the_last(scored, start, [runs[folder] for folder in found.runs])
    old = next((one for one in scored if one.folder == start), None)
    after = [one for one in scored if one is not old] or scored
    return Collected(replace(old, label=BEFORE) if old and old not in after else None, _labelled(after))


def _resolved(path: str | Path) -> Path:
    return Path(path).resolve()


def _find(paths: Sequence[str | Path]) -> _Found:
    found = _Found()
    for given in paths:
        path = _resolved(given)
        if not path.exists() and "=" in str(given):
            left, right = (_resolved(part) for part in str(given).rsplit("=", 1))
            for folder, name in ((left, "scores.json"), (right, "run.json")):
                if not (folder / name).is_file():
                    raise NekoLeanError(f"{folder} holds no {name}: SCORES=RUN wants a score folder and its run.")
            found.scores.append(left)
            found.pairs[left] = right
        elif not path.is_dir():
            raise NekoLeanError(f"{given} is not a folder: {WANTED}.")
        elif (path / "scores.json").is_file():
            found.scores.append(path)
        elif (path / "run.json").is_file():
            found.runs.append(path)
        else:
            inside = _inside(path)
            if not inside:
                raise NekoLeanError(f"{given} holds neither scores.json nor run.json: {WANTED}.")
            found.scores += [one for one in inside if (one / "scores.json").is_file()]
            found.nearby += [one for one in inside if not (one / "scores.json").is_file()]
    found.scores, found.runs = list(dict.fromkeys(found.scores)), list(dict.fromkeys(found.runs))
    return found


def _inside(folder: Path) -> list[Path]:
    """The score and run folders in `folder`: in the order in which the demo made them, others by name."""
    order: list[str] = []
    if (folder / "demo.json").is_file():
        files = _read_object(folder / "demo.json").get("files")
        order = list(files) if isinstance(files, dict) else []
    inside = [
        one
        for one in folder.iterdir()
        if one.is_dir()
        and is_inside(folder, one.name)
        and any((one / f"{n}.json").is_file() for n in ("scores", "run"))
    ]
    return sorted(inside, key=lambda one: (order.index(one.name) if one.name in order else len(order), one.name))


def _read_object(file: Path) -> dict[str, Any]:
    _refuse_elsewhere(file)
    try:
        value = _writable(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise NekoLeanError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise NekoLeanError(f"{file} is not JSON: make it again with `neko-lean score` or `unlearn`.") from error
    if not isinstance(value, dict):
        raise NekoLeanError(f"{file} holds no JSON object: make it again with `neko-lean score` or `unlearn`.")
    return value


def _refuse_elsewhere(file: Path) -> None:
    """A report is sent around: a link in a folder that somebody else made must not bring a file of ours into it."""
    if not is_inside(file.parent, file.name):
        raise NekoLeanError(f"{file} is a link that leads out of its folder: put the file itself there.")


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file; none where there is no file, as when texts were removed to be shared."""
    if not file.is_file():
        return []
    _refuse_elsewhere(file)
    try:
        return [_writable(line.values) for line in read_jsonl(file, lone_surrogates=True)]
    except (ValueError, RecursionError) as error:
        raise NekoLeanError(f"{file} is not JSON Lines ({type(error).__name__}): make it again.") from error


def _writable(value: Any) -> Any:
    """The same with every lone surrogate replaced: JSON may spell them, UTF-8 cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() if not value.isascii() else value
    if isinstance(value, list):
        return [_writable(one) for one in value]
    if isinstance(value, dict):
        return {_writable(key): _writable(one) for key, one in value.items()}
    return value


def _read_scores(folder: Path) -> Scored:
    return Scored(folder, "", _read_object(folder / "scores.json"), _read_lines(folder / "generations.jsonl"))


def _read_run(folder: Path) -> Run:
    return Run(folder, _read_object(folder / "run.json"), _read_lines(folder / "metrics.jsonl"))


def _model(scored: Scored) -> str:
    return text(scored.scores, "model")


def _before(scored: list[Scored], runs: list[Run], named: Path | None) -> Path | None:
    """The folder of the scores before: the named one, else of the model that runs or differences start from."""
    if named is not None:
        return named
    starts = {text(run.about, "model") for run in runs if run.unlearned}
    starts |= {text(one.scores, "difference", "before") for one in scored}
    starts.discard("")
    for one in scored:
        if _model(one) in starts:
            return one.folder
    without = [one.folder for one in scored if one.run is None]
    if starts:
        return without[0] if len(without) == 1 and len(scored) > 1 else None
    return scored[0].folder if len(scored) > 1 else None


def _pair_the_last(scored: list[Scored], start: Path | None, runs: list[Run]) -> list[Scored]:
    """Give a run that no name led to its scores, where only one pair is left; refuse to guess where there are more."""
    taken = {one.run.folder for one in scored if one.run}
    loose = [run for run in runs if run.folder not in taken]
    open_ = [one for one in scored if one.run is None and (one.folder != start or len(scored) == 1)]
    if not loose:
        return scored
    if len(loose) > 1 or len(open_) != 1:
        raise NekoLeanError(f"{loose[0].folder} is the model of none of these scores: write it as SCORES=RUN.")
    return [replace(one, run=loose[0]) if one is open_[0] else one for one in scored]


def _labelled(scored: list[Scored]) -> list[Scored]:
    """Name each by its recipe, or its model; where two would be called the same, by their folders too."""
    plain = []
    for one in scored:
        recipe = text(one.run.about, "recipe", "name") if one.run and one.run.unlearned else ""
        plain.append(recipe or _model(one) or one.folder.name)
    counts = Counter([*plain, BEFORE])
    names = [
        f"{name}, {one.folder.name}" if counts[name] > 1 else name for name, one in zip(plain, scored, strict=True)
    ]
    twice = Counter(names)
    return [
        replace(one, label=f"{name}, {number}" if twice[name] > 1 else name)
        for number, (name, one) in enumerate(zip(names, scored, strict=True), start=1)
    ]
