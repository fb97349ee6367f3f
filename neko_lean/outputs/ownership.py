"""Recognize the folders and files that neko-lean wrote, so that it never replaces or removes anything else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neko_lean.jsonio import json_object

MANIFEST, SCORES, RUN, DEMO = "manifest.json", "scores.json", "run.json", "demo.json"

# Files that the operating system, or `neko-lean report`, may put into any folder.
_HARMLESS = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+|report\.html")

_TEMPORARY = re.compile(r"\..+\.tmp")

_SHARD_FILES = r"(shard|forget)-\d{5}-of-\d{5}\.safetensors"
_SCORE_FILES = r"generations\.jsonl|documents\.jsonl"
_DEMO_FILES = r"data|base|target|(teacher|unlearned|scores)-.+"

# What a run writes to its work folder, by the kind of work folder (Output.kind).
_WORK_FILES = {
    "partial": re.compile(
        rf"plan\.json|manifest\.json|{_SHARD_FILES}(\.json)?|scores\.json|generations(-\d+)?\.jsonl|documents\.jsonl"
        r"|relearn|self_generated\.jsonl"
    ),
    "saved": re.compile(
        r"(damaged-)?(step|best)-\d+(-\d+)?|output|complete|cache|\.cache\.(partial|lock|old)|metrics\.jsonl|lock"
    ),
    "demo": re.compile(rf"{_DEMO_FILES}|report\.html|demo\.json|\.({_DEMO_FILES}).+"),
}


@dataclass(frozen=True)
class _Marker:
    """How to recognize a finished output by one of its files.

    Attributes:
        keys: keys of the file's JSON object that distinguish it from a file of another program.
        is_ours: whether the command wrote a file of this name, given the JSON object.
    """

    keys: set[str]
    is_ours: Callable[[Mapping[str, Any], str], bool]


def _is_cache_file(manifest: Mapping[str, Any], name: str) -> bool:
    return re.fullmatch(rf"{_SHARD_FILES}|self_generated\.jsonl", name) is not None


def _is_score_file(scores: Mapping[str, Any], name: str) -> bool:
    return re.fullmatch(_SCORE_FILES, name) is not None


def _is_run_file(run: Mapping[str, Any], name: str) -> bool:
    """run.json lists the files of its folder. Without a list, every file counts as written by the run."""
    files = run.get("files")
    return name in files if isinstance(files, list) else True


def _is_demo_file(demo: Mapping[str, Any], name: str) -> bool:
    return re.fullmatch(_DEMO_FILES, name) is not None


# By file name, in the order in which they are looked for.
_MARKERS = {
    DEMO: _Marker({"scores", "files", "verdict"}, _is_demo_file),
    RUN: _Marker({"recipe", "steps", "seed"}, _is_run_file),
    SCORES: _Marker({"cells", "verdict"}, _is_score_file),
    MANIFEST: _Marker({"written_by", "shards"}, _is_cache_file),
}


def why_not_ours(folder: Path) -> str | None:
    """Check that everything in a folder was written by one of neko-lean's commands.

    Returns:
        None if so, otherwise the reason: a phrase that follows the folder's name in an error message, such as
        'holds thesis.txt, which neko-lean did not write'.
    """
    # Find the file that identifies the command that wrote the folder.
    names = {path.name for path in folder.iterdir()}
    marker = next((name for name in _MARKERS if name in names and (folder / name).is_file()), None)
    if marker is None:
        return f"holds none of {', '.join(_MARKERS)}"
    content = json_object(folder / marker)
    if content is None:
        return f"has a {marker} that is not a JSON object"
    if not _MARKERS[marker].keys <= content.keys():
        return f"has a {marker} that neko-lean did not write"

    # Look for files that this command does not write.
    for name in sorted(names - {marker}):
        known = _MARKERS[marker].is_ours(content, name) or _HARMLESS.fullmatch(name)
        if not known and why_not_our_file(folder / name) is not None:
            return f"holds {name}, which neko-lean did not write"
    return None


def why_not_our_work(folder: Path, kind: str) -> str | None:
    """Check that a work folder holds only what a run of its kind writes. Returns a phrase as `why_not_ours` does."""
    patterns = (_WORK_FILES[kind], _TEMPORARY, _HARMLESS)
    names = sorted(path.name for path in folder.iterdir())
    foreign = next((name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)), None)
    return None if foreign is None else f"holds {foreign}, which neko-lean did not write"


def why_not_our_file(file: Path) -> str | None:
    """Check that a file is a report, or a result file of the shared task that `score` wrote.

    Returns:
        None if so, otherwise the reason: a phrase that follows the file's name in an error message.
    """
    if not file.is_file():
        return "is not an ordinary file"
    with file.open("rb") as opened:
        head = opened.read(2**16)
    if b'<meta name="generator" content="neko-lean ' in head:
        return None
    content = json_object(file)
    if content is not None and {"aggregated-terms", "harmonic-mean-task-aggregate"} <= content.keys():
        return None
    return "was not written by neko-lean"
