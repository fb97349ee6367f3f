"""Which folders and files neko-lean wrote, so that nothing else is ever replaced or cleared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neko_lean.jsonio import json_object

MANIFEST, SCORES, RUN, DEMO = "manifest.json", "scores.json", "run.json", "demo.json"


# Names that the system or a report puts into any folder.
_HARMLESS = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+|report\.html")


_SHARDS = r"(shard|forget)-\d{5}-of-\d{5}\.safetensors"


_SCORE_FILES = r"generations\.jsonl|documents\.jsonl"


_DEMO_FILES = r"data|base|target|(teacher|unlearned|scores)-.+"


# What may lie in a work folder of each kind, besides temporary files: what a run of that kind writes there.
_WORK = {
    "partial": re.compile(
        rf"plan\.json|manifest\.json|{_SHARDS}(\.json)?|scores\.json|generations(-\d+)?\.jsonl|documents\.jsonl|relearn"
    ),
    "saved": re.compile(
        r"(damaged-)?(step|best)-\d+(-\d+)?|output|complete|cache|\.cache\.(partial|lock|old)|metrics\.jsonl|lock"
    ),
    "demo": re.compile(rf"{_DEMO_FILES}|report\.html|demo\.json|\.({_DEMO_FILES}).+"),
}


_TEMPORARY = re.compile(r"\..+\.tmp")


def why_not_ours(folder: Path) -> str | None:
    """Why a folder that holds something is not, or not only, the output of one of our commands; None when it is.

    The reason completes a sentence that begins with the folder: 'holds thesis.txt, which neko-lean did not write'.
    """
    names = {path.name for path in folder.iterdir()}
    marker = next((name for name in _MARKERS if name in names and (folder / name).is_file()), None)
    if marker is None:
        return f"holds none of {', '.join(_MARKERS)}"
    content = json_object(folder / marker)
    if content is None:
        return f"has a {marker} that is not a JSON object"
    keys, written = _MARKERS[marker]
    if not keys <= content.keys():
        return f"has a {marker} that neko-lean did not write"
    for name in sorted(names - {marker}):
        known = written(content, name) or _HARMLESS.fullmatch(name)
        if not known and why_not_our_file(folder / name) is not None:
            return f"holds {name}, which neko-lean did not write"
    return None


def why_not_our_work(folder: Path, kind: str) -> str | None:
    """Why a work folder holds more than a run of its kind leaves there; None when it does not. As `why_not_ours`."""
    known = _WORK[kind]
    strangers = sorted(
        path.name
        for path in folder.iterdir()
        if not (known.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name) or _HARMLESS.fullmatch(path.name))
    )
    return f"holds {strangers[0]}, which neko-lean did not write" if strangers else None


def why_not_our_file(file: Path) -> str | None:
    """Why a file is neither a report nor the shared task's results as `score` writes them; None when it is."""
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


def _of_cache(manifest: Mapping[str, Any], name: str) -> bool:
    return re.fullmatch(_SHARDS, name) is not None


def _of_score(scores: Mapping[str, Any], name: str) -> bool:
    return re.fullmatch(_SCORE_FILES, name) is not None


def _of_run(run: Mapping[str, Any], name: str) -> bool:
    """By the list that run.json has of its folder; a run.json without one vouches for all of it."""
    files = run.get("files")
    return name in files if isinstance(files, list) else True


def _of_demo(demo: Mapping[str, Any], name: str) -> bool:
    return re.fullmatch(_DEMO_FILES, name) is not None


# The file that a finished output has, the keys by which it is told from another program's, and what else may lie there.
_MARKERS: dict[str, tuple[set[str], Callable[[Mapping[str, Any], str], bool]]] = {
    DEMO: ({"scores", "files", "verdict"}, _of_demo),
    RUN: ({"recipe", "steps", "seed"}, _of_run),
    SCORES: ({"cells", "verdict"}, _of_score),
    MANIFEST: ({"written_by", "shards"}, _of_cache),
}
