"""Read the score and run folders of a report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neko_lean.data import read_jsonl
from neko_lean.errors import NekoLeanError
from neko_lean.models import is_inside
from neko_lean.reporting.values import text

SCORES, GENERATIONS = "scores.json", "generations.jsonl"
RUN, METRICS = "run.json", "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """A training run: the content of run.json, and the lines of metrics.jsonl."""

    folder: Path
    about: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def is_unlearning(self) -> bool:
        """Whether the run unlearned, as opposed to `memorize`."""
        return text(self.about, "command") != "memorize"


@dataclass(frozen=True)
class Scored:
    """A scored model.

    Attributes:
        folder: its score folder.
        label: its name on the page.
        scores: the content of scores.json.
        rows: the lines of generations.jsonl.
        run: the run that trained it, if known.
    """

    folder: Path
    label: str
    scores: dict[str, Any]
    rows: list[dict[str, Any]]
    run: Run | None = None

    @property
    def model(self) -> str:
        """The name of the scored model."""
        return text(self.scores, "model")


def read_scores(folder: Path) -> Scored:
    """Read a score folder; the label is left empty."""
    return Scored(folder, "", read_object(folder / SCORES), _read_lines(folder / GENERATIONS))


def read_run(folder: Path) -> Run:
    """Read a run folder."""
    return Run(folder, read_object(folder / RUN), _read_lines(folder / METRICS))


def read_object(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file; raises NekoLeanError if that fails."""
    _refuse_outside(file)
    try:
        value = _encodable(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise NekoLeanError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise NekoLeanError(f"{file} is not JSON: create it again with `neko-lean score` or `unlearn`.") from error
    if not isinstance(value, dict):
        raise NekoLeanError(f"{file} holds no JSON object: create it again with `neko-lean score` or `unlearn`.")
    return value


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; no lines if there is no file, since it may have been removed before sharing."""
    if not file.is_file():
        return []
    _refuse_outside(file)
    try:
        return [_encodable(line.values) for line in read_jsonl(file, lone_surrogates=True)]
    except (ValueError, RecursionError) as error:
        raise NekoLeanError(f"{file} is not JSON Lines ({type(error).__name__}): create it again.") from error


def _refuse_outside(file: Path) -> None:
    """Raise NekoLeanError for a link to a file outside its folder.

    Reports are shared, and a folder from somebody else must not bring the reader's own files into one.
    """
    if not is_inside(file.parent, file.name):
        raise NekoLeanError(f"{file} is a link to a file outside its folder: copy the file itself there.")


def _encodable(value: Any) -> Any:
    """Replace every lone surrogate, which JSON can express and UTF-8 cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() if not value.isascii() else value
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value
