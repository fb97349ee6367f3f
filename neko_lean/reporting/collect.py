"""Find the score and run folders of a report, and match each score with the run that trained its model.

An argument may be a score folder (with scores.json), a run folder of `unlearn` (with run.json), or a folder of such
folders, as `neko-lean demo` writes it. A run belongs to the scores of the model in the run folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from neko_lean.errors import NekoLeanError
from neko_lean.models import is_inside
from neko_lean.reporting.read import RUN, SCORES, Run, Scored, read_object, read_run, read_scores
from neko_lean.reporting.values import text

BEFORE = "before"
EXPECTED = "give folders that `neko-lean score` or `unlearn` wrote, or a folder that holds them"


@dataclass(frozen=True)
class Collected:
    """The models of a report: the one before unlearning, if it was scored, and the others."""

    before: Scored | None
    after: list[Scored]

    @property
    def all(self) -> list[Scored]:
        """All models, the one before first."""
        return [*([self.before] if self.before else []), *self.after]


@dataclass
class _Folders:
    """The folders found.

    Attributes:
        scores: score folders.
        runs: run folders named on the command line; each must match a score.
        nearby: run folders inside a folder that was named; they may match no score.
        pairs: score folders with their run folders, as given by SCORES=RUN.
    """

    scores: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    nearby: list[Path] = field(default_factory=list)
    pairs: dict[Path, Path] = field(default_factory=dict)


def collect(paths: Sequence[str | Path], before: str | Path | None = None) -> Collected:
    """Read all score and run folders and match them.

    Args:
        paths: the folders, or SCORES=RUN for a pair.
        before: score folder of the model before unlearning. By default, that of the model that the runs started from,
            or without runs the first of several.

    Raises:
        NekoLeanError: a folder is neither kind of folder, there are no scores, or a run matches no score.
    """
    folders = _find_folders(paths)
    named_start = None if before is None else _start_folder(before)
    if named_start is not None and named_start not in folders.scores:
        folders.scores.insert(0, named_start)
    if not folders.scores:
        raise NekoLeanError(f"{', '.join(map(str, paths))}: no scores among them; {EXPECTED}.")

    # Read and match.
    runs = {folder: read_run(folder) for folder in [*folders.runs, *folders.nearby, *folders.pairs.values()]}
    scored = _with_runs([read_scores(folder) for folder in folders.scores], runs, folders.pairs)
    start = named_start or _find_start(scored, list(runs.values()))
    scored = _match_remaining(scored, start, [runs[folder] for folder in folders.runs])

    # The model before, and the others.
    first = next((model for model in scored if model.folder == start), None)
    after = [model for model in scored if model is not first] or scored
    return Collected(replace(first, label=BEFORE) if first and first not in after else None, _with_labels(after))


def _start_folder(before: str | Path) -> Path:
    folder = _resolved(before)
    if not (folder / SCORES).is_file():
        raise NekoLeanError(f"--before {before} holds no {SCORES}: give a folder that `neko-lean score` wrote.")
    return folder


def _resolved(path: str | Path) -> Path:
    return Path(path).resolve()


def _find_folders(paths: Sequence[str | Path]) -> _Folders:
    """Sort the given folders by what they hold."""
    folders = _Folders()
    for given in paths:
        path = _resolved(given)
        if not path.exists() and "=" in str(given):
            scores, run = _pair(str(given))
            folders.scores.append(scores)
            folders.pairs[scores] = run
        elif not path.is_dir():
            raise NekoLeanError(f"{given} is not a folder: {EXPECTED}.")
        elif (path / SCORES).is_file():
            folders.scores.append(path)
        elif (path / RUN).is_file():
            folders.runs.append(path)
        else:
            inside = _folders_inside(path)
            if not inside:
                raise NekoLeanError(f"{given} holds neither {SCORES} nor {RUN}: {EXPECTED}.")
            folders.scores += [folder for folder in inside if (folder / SCORES).is_file()]
            folders.nearby += [folder for folder in inside if not (folder / SCORES).is_file()]
    folders.scores, folders.runs = list(dict.fromkeys(folders.scores)), list(dict.fromkeys(folders.runs))
    return folders


def _pair(given: str) -> tuple[Path, Path]:
    """The two folders of SCORES=RUN."""
    scores, run = (_resolved(part) for part in given.rsplit("=", 1))
    for folder, name in ((scores, SCORES), (run, RUN)):
        if not (folder / name).is_file():
            raise NekoLeanError(f"{folder} holds no {name}: SCORES=RUN needs a score folder and its run folder.")
    return scores, run


def _folders_inside(folder: Path) -> list[Path]:
    """The score and run folders in a folder, in the order in which the demo wrote them, others by name."""
    order: list[str] = []
    if (folder / "demo.json").is_file():
        files = read_object(folder / "demo.json").get("files")
        order = list(files) if isinstance(files, dict) else []
    inside = [
        path
        for path in folder.iterdir()
        if path.is_dir() and is_inside(folder, path.name) and any((path / name).is_file() for name in (SCORES, RUN))
    ]
    return sorted(inside, key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))


def _with_runs(scored: Sequence[Scored], runs: Mapping[Path, Run], pairs: Mapping[Path, Path]) -> list[Scored]:
    """Match each score with the run given for it, or with the run folder that its model is named after."""
    by_name = {folder.name: run for folder, run in reversed(list(runs.items()))}
    return [
        replace(model, run=runs[pairs[model.folder]] if model.folder in pairs else by_name.get(model.model))
        for model in scored
    ]


def _find_start(scored: Sequence[Scored], runs: Sequence[Run]) -> Path | None:
    """The score folder of the model that the runs, or the differences in the scores, started from."""
    starts = {text(run.about, "model") for run in runs if run.is_unlearning}
    starts |= {text(model.scores, "difference", "before") for model in scored}
    starts.discard("")
    for model in scored:
        if model.model in starts:
            return model.folder
    without_run = [model.folder for model in scored if model.run is None]
    if starts:
        return without_run[0] if len(without_run) == 1 and len(scored) > 1 else None
    return scored[0].folder if len(scored) > 1 else None


def _match_remaining(scored: list[Scored], start: Path | None, runs: Sequence[Run]) -> list[Scored]:
    """Match the last run and the last score that are left; raise NekoLeanError if there are more."""
    matched = {model.run.folder for model in scored if model.run}
    unmatched = [run for run in runs if run.folder not in matched]
    if not unmatched:
        return scored
    without_run = [model for model in scored if model.run is None and (model.folder != start or len(scored) == 1)]
    if len(unmatched) > 1 or len(without_run) != 1:
        raise NekoLeanError(
            f"{unmatched[0].folder} is not the model of any of these scores: give the pair as SCORES=RUN."
        )
    return [replace(model, run=unmatched[0]) if model is without_run[0] else model for model in scored]


def _with_labels(scored: Sequence[Scored]) -> list[Scored]:
    """Label each model by its recipe or its name, and models with the same label also by folder."""
    names = []
    for model in scored:
        recipe = text(model.run.about, "recipe", "name") if model.run and model.run.is_unlearning else ""
        names.append(recipe or model.model or model.folder.name)
    counts = Counter([*names, BEFORE])
    labels = [
        f"{name}, {model.folder.name}" if counts[name] > 1 else name for name, model in zip(names, scored, strict=True)
    ]
    duplicates = Counter(labels)
    return [
        replace(model, label=f"{label}, {number}" if duplicates[label] > 1 else label)
        for number, (label, model) in enumerate(zip(labels, scored, strict=True), start=1)
    ]
