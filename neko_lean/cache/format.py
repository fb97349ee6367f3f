"""The cache's manifest and constants; FORMAT.md beside this file says what each field means."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from neko_lean.errors import NekoLeanError
from neko_lean.identity import config_differences
from neko_lean.outputs import write_atomically

FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 lacks the teacher's config
MANIFEST = "manifest.json"
SCALE = 2.0**15  # stored probabilities are p * SCALE: float16 then holds p >= 1.9e-9 with 11 bits
STORED = {"float16": "F16", "float32": "F32"}  # dtypes of scaled_p, and what safetensors calls them
_SHARD_NAME = re.compile(r"(shard|forget)-\d{5}-of-\d{5}\.safetensors")
UNSIGNED = "0" * 64  # stands where the manifest's own checksum will
_LARGEST = 2**48  # no count in a manifest can honestly be larger


class CacheError(NekoLeanError):
    """The cache is damaged, unreadable, or was made from something else than what it is used with."""


@dataclass(frozen=True)
class Shard:
    """One file of the cache; `rows` is [(id, positions, digest), ...] in the order in which they lie in it."""

    file: str
    bytes: int
    sha256: str
    rows: list[tuple[str, int, str]]

    @property
    def positions(self) -> int:
        return sum(positions for _, positions, _ in self.rows)


@dataclass(frozen=True)
class Manifest:
    """manifest.json, but for its checksum."""

    written_by: str
    model: str
    weights: str
    tokenizer: str
    format: str
    max_length: int
    top_k: int
    mass: float
    vocab_size: int
    teacher_dtype: str
    batch_tokens: int
    stored_dtype: str
    rows: int
    positions: int
    entries: int
    truncated: int
    mean_mass: float
    shards: list[Shard] = field(default_factory=list)
    forget_shards: list[Shard] = field(default_factory=list)
    config: dict[str, Any] | None = None  # identity.model_config of the teacher; None in format version 1
    format_version: int = FORMAT_VERSION


def shard_name(kind: str, number: int, count: int) -> str:
    """shard-00000-of-0000N.safetensors, or forget-..."""
    return f"{kind}-{number:05d}-of-{count:05d}.safetensors"


def id_dtype(vocab_size: int) -> type[np.generic]:
    """The narrowest dtype of the format that holds every token id."""
    return np.uint16 if vocab_size <= 65536 else np.int32


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest, signed with the SHA-256 of its own bytes, so that it is either absent or whole."""
    text = json.dumps({**asdict(manifest), "checksum": UNSIGNED}, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, sign(text.encode()))


def sign(unsigned: bytes) -> bytes:
    """Put the SHA-256 of a manifest's bytes where its last 64 zeros are."""
    before, _, after = unsigned.rpartition(UNSIGNED.encode())
    return before + hashlib.sha256(unsigned).hexdigest().encode() + after


def is_signed(data: bytes, checksum: object) -> bool:
    """Whether `checksum` is what `sign` put into these bytes."""
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        return False
    before, _, after = data.rpartition(checksum.encode())
    return sign(before + UNSIGNED.encode() + after) == data


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest: its version, its checksum, every field's type and range. Raises CacheError."""
    if not path.is_file():
        raise CacheError(
            f"{path.parent} holds no {path.name}: it is no complete teacher cache; run cache-teacher again."
        )
    try:
        data = path.read_bytes()
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CacheError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise CacheError(f"{path} is not a JSON object.")
    version = raw.get("format_version")
    if version not in READABLE or isinstance(version, bool):
        writer = raw.get("written_by", "unknown")
        raise CacheError(
            f"{path} has format version {version!r}, written by neko-lean {writer}; this one reads "
            f"{' and '.join(map(str, READABLE))}."
        )
    checksum = raw.pop("checksum", None)
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        raise CacheError(f"{path} lacks its checksum, or holds one of the wrong type.")
    if not is_signed(data, checksum):
        raise CacheError(f"{path} is damaged: its checksum differs; run cache-teacher again.")
    try:
        return _manifest(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} lacks a field or holds one of the wrong type or range ({error}).") from error


def _manifest(raw: dict[str, Any]) -> Manifest:
    values: dict[str, Any] = {}
    for one in fields(Manifest):
        if one.name == "config":
            values["config"] = None if raw["format_version"] == 1 else _typed(raw["config"], dict, "config")
            continue
        value = raw[one.name]
        if one.name in ("shards", "forget_shards"):
            values[one.name] = [_shard(entry) for entry in _typed(value, list, one.name)]
        elif one.type == "int":
            values[one.name] = _count(value, one.name)
        elif one.type == "float":
            values[one.name] = _typed(value, float, one.name)
            if not (math.isfinite(value) and 0 <= value <= 1 + 1e-6):
                raise ValueError(f"{one.name} is {value}")
        else:
            values[one.name] = _typed(value, str, one.name)
    found = Manifest(**values)
    if found.stored_dtype not in STORED:
        raise ValueError(f"stored_dtype is {found.stored_dtype!r}")
    if min(found.top_k, found.vocab_size, found.max_length) < 1:
        raise ValueError("top_k, vocab_size and max_length must be at least 1")
    for shards in (found.shards, found.forget_shards):
        # A forget row and a retain row may share an id, but not their text as well.
        seen = [(row_id, digest) for shard in shards for row_id, _, digest in shard.rows]
        if len(set(seen)) != len(seen) or len({shard.file for shard in shards}) != len(shards):
            raise ValueError("a row or a shard is listed twice")
    listed = [(len(shard.rows), shard.positions) for shard in found.shards]
    if [found.rows, found.positions] != [sum(column) for column in zip((0, 0), *listed, strict=True)]:
        raise ValueError("rows and positions are not those of the shards")
    return found


def _shard(entry: Any) -> Shard:
    _typed(entry, dict, "shard")
    name = _typed(entry["file"], str, "file")
    if not _SHARD_NAME.fullmatch(name):
        raise ValueError(f"shard file {name!r} is no plain file name of a shard")
    rows = [_listed_row(row) for row in _typed(entry["rows"], list, "rows")]
    return Shard(name, _count(entry["bytes"], "bytes"), _typed(entry["sha256"], str, "sha256"), rows)


def _listed_row(row: Any) -> tuple[str, int, str]:
    row_id, positions, digest = _typed(row, list, "row")
    return _typed(row_id, str, "id"), _count(positions, "positions"), _typed(digest, str, "digest")


def _typed(value: Any, wanted: type, name: str) -> Any:
    if type(value) is not wanted:
        raise TypeError(f"{name} is {type(value).__name__}, not {wanted.__name__}")
    return value


def _count(value: Any, name: str) -> int:
    if not 0 <= _typed(value, int, name) <= _LARGEST:
        raise ValueError(f"{name} is {value}")
    return int(value)


def differences(old: Manifest, new: Manifest) -> list[str]:
    """Names of the fields in which two manifests differ; of the teacher's config, its keys with both values.

    What format version 1 does not say is not compared.
    """
    names = [f.name for f in fields(Manifest) if f.name not in ("config", "format_version")]
    found = [name for name in names if getattr(old, name) != getattr(new, name)]
    if old.config is not None and new.config is not None:
        found += config_differences(old.config, new.config)
    return found
