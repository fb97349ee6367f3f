"""The cache's manifest and constants; FORMAT.md beside this file says what each field means."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from neko_lean.errors import NekoLeanError, sync

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SCALE = 2.0**15  # stored probabilities are p * SCALE: float16 then holds p >= 1.9e-9 with 11 bits


class CacheError(NekoLeanError):
    """The cache is damaged, unreadable, or was made from something else than what it is used with."""


@dataclass(frozen=True)
class Shard:
    """One file of the cache; `rows` is [(id, positions, digest), ...] in the order in which they lie in it."""

    file: str
    bytes: int
    sha256: str
    rows: list[tuple[str, int, str]]


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    written_by: str
    model: str
    weights: str
    tokenizer: str
    format: str
    max_length: int
    top_k: int
    vocab_size: int
    teacher_dtype: str
    rows: int
    positions: int
    entries: int
    truncated: int
    mean_mass: float
    shards: list[Shard] = field(default_factory=list)
    format_version: int = FORMAT_VERSION


def shard_name(number: int, count: int) -> str:
    """shard-00000-of-0000N.safetensors"""
    return f"shard-{number:05d}-of-{count:05d}.safetensors"


def id_dtype(vocab_size: int) -> type[np.generic]:
    """The narrowest dtype of the format that holds every token id."""
    return np.uint16 if vocab_size <= 65536 else np.int32


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json so that it is either absent or whole."""
    text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False)
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json. Raises CacheError in one sentence."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CacheError(f"{folder} holds no {MANIFEST}: it is no complete teacher cache; run cache-teacher again.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CacheError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise CacheError(f"{path} is not a JSON object.")
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        writer = raw.get("written_by", "unknown")
        raise CacheError(
            f"{path} has format version {version!r}, written by neko-lean {writer}; this one reads {FORMAT_VERSION}."
        )
    try:
        known = {f.name for f in fields(Manifest)}
        raw["shards"] = [_shard(entry) for entry in raw["shards"]]
        return Manifest(**{key: value for key, value in raw.items() if key in known})
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} lacks a field or holds one of the wrong type ({error}).") from error


def _shard(entry: dict[str, object]) -> Shard:
    name, rows = entry["file"], entry["rows"]
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"shard file {name!r} is no plain file name")
    if not isinstance(rows, list):
        raise TypeError(f"rows of {name} are no list")
    listed = [(str(row_id), int(positions), str(digest)) for row_id, positions, digest in rows]
    return Shard(name, int(str(entry["bytes"])), str(entry["sha256"]), listed)
