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

from neko_lean.data import FORMATS
from neko_lean.errors import NekoLeanError, first_line
from neko_lean.identity import config_differences
from neko_lean.outputs import write_atomically

FORMAT_VERSION = 2
READABLE = (1, 2)  # format versions; 1 has no `config`
MANIFEST = "manifest.json"
SCALE = 2.0**15  # stored probabilities are p * SCALE: float16 then holds p >= 1.9e-9 with 11 bits
STORED = {"float16": "F16", "float32": "F32"}  # dtypes of scaled_p, and what safetensors calls them
TEACHER_DTYPES = ("float32", "bfloat16")
_SHA256 = re.compile("[0-9a-f]{64}")
UNSIGNED = "0" * 64  # stands where the manifest's own checksum will
_LARGEST = 2**48  # no count in a manifest can honestly be larger
_LARGEST_VOCABULARY = 2**31  # ids are stored as int32
_DEEPEST = 16  # objects and lists inside each other in `config`
_LISTED = {"shards": "shard", "forget_shards": "forget"}  # fields that list shards, and what the names begin with


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
    config: dict[str, Any] | None = None  # identity.model_config of the teacher; None: format version 1
    format_version: int = FORMAT_VERSION

    @property
    def is_plan(self) -> bool:
        """Whether the shards are still to be written: no byte, checksum or total is known yet."""
        shards = [*self.shards, *self.forget_shards]
        return not (self.entries or self.mean_mass or any(shard.bytes or shard.sha256 for shard in shards))


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
    write_atomically(path, manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """A manifest as it is written: signed JSON. Raises CacheError naming a text that UTF-8 cannot hold."""
    text = json.dumps({**asdict(manifest), "checksum": UNSIGNED}, indent=1, ensure_ascii=False) + "\n"
    try:
        return sign(text.encode())
    except UnicodeEncodeError as error:
        raise CacheError(_not_text(manifest, text[error.start])) from error


def _not_text(manifest: Manifest, character: str) -> str:
    """A sentence that names the text that holds half of a surrogate pair, as a file name that is not UTF-8 does."""
    if character in manifest.model:
        return f"the name of the teacher's folder, {manifest.model!r}, is not UTF-8 text: rename the folder."
    rows = [row_id for shard in (*manifest.shards, *manifest.forget_shards) for row_id, _, _ in shard.rows]
    row_id = next((row_id for row_id in rows if character in row_id), None)
    if row_id is not None:
        return f"the id of row {row_id!r} holds {character!r}, half of a surrogate pair: give the row another id."
    return f"the teacher's config.json holds {character!r}, half of a surrogate pair, which is no text: remove it."


def checked(manifest: Manifest) -> Manifest:
    """A plan as it is read back after it was written, so that what no manifest can hold is found before any work.

    Raises:
        CacheError: a row that has no token, a number out of range, or text that is not UTF-8.
    """
    for name, fewest in (("shards", 1), ("forget_shards", 0)):
        for row_id, positions, _ in (row for shard in getattr(manifest, name) for row in shard.rows):
            if positions < fewest:
                raise CacheError(f"row {row_id!r} has no token in this tokenizer: remove it, or give it a text.")
    for name, option in (("top_k", "--top-k"), ("max_length", "--max-length"), ("batch_tokens", "--batch-tokens")):
        value = getattr(manifest, name)
        if not 1 <= value <= _LARGEST:
            raise CacheError(f"{option} is {value}: it must be at least 1 and at most {_LARGEST}.")
    if not manifest.rows:
        raise CacheError("there are no rows to cache: give a retain file that holds some.")
    data = manifest_bytes(manifest)
    try:
        return parse_manifest(json.loads(data))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"no manifest can describe this cache ({first_line(error)}).") from error


def sign(unsigned: bytes) -> bytes:
    """Put the SHA-256 of a manifest's bytes where its last 64 zeros are."""
    before, _, after = unsigned.rpartition(UNSIGNED.encode())
    return before + hashlib.sha256(unsigned).hexdigest().encode() + after


def is_signed(data: bytes, checksum: object) -> bool:
    """Whether `checksum` is what `sign` put into these bytes."""
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
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
        raise CacheError(f"{path} cannot be read as JSON ({first_line(error)}).") from error
    if not isinstance(raw, dict):
        raise CacheError(f"{path} is not a JSON object.")
    version = raw.get("format_version")
    if version not in READABLE or isinstance(version, bool):
        writer = raw.get("written_by", "unknown")
        raise CacheError(
            f"{path} has format version {version!r}, written by neko-lean {writer!r}; this one reads "
            f"{' and '.join(map(str, READABLE))}."
        )
    checksum = raw.pop("checksum", None)
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        raise CacheError(f"{path} lacks its checksum, or holds one of the wrong type.")
    if not is_signed(data, checksum):
        raise CacheError(f"{path} is damaged: its checksum differs; run cache-teacher again.")
    try:
        return parse_manifest(raw)
    except (KeyError, TypeError, ValueError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise CacheError(f"{path} lacks a field or holds one of the wrong type or range ({what}).") from error


def parse_manifest(raw: dict[str, Any]) -> Manifest:
    """A manifest's JSON object as a Manifest. Raises KeyError, TypeError or ValueError for what FORMAT.md does not
    allow."""
    values: dict[str, Any] = {}
    for one in fields(Manifest):
        if one.name == "config":
            values["config"] = _config(raw)
            continue
        value = raw[one.name]
        if one.name in _LISTED:
            values[one.name] = [_shard(entry) for entry in _typed(value, list, one.name)]
        elif one.type == "int":
            values[one.name] = _count(value, one.name)
        elif one.type == "float":
            values[one.name] = _typed(value, float, one.name)
            if not (math.isfinite(value) and 0 <= value <= 1 + 1e-6):
                raise ValueError(f"{one.name} is {value}, not in 0 to 1")
        else:
            values[one.name] = _text(value, one.name)
    found = Manifest(**values)
    _check_shards(found)
    _check_fields(found)
    return found


def _config(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The teacher's config, which format version 1 did not have."""
    if raw["format_version"] == 1:
        return None
    config: dict[str, Any] = _typed(raw["config"], dict, "config")
    _refuse_deep(config, _DEEPEST)
    return config


def _refuse_deep(value: Any, levels: int) -> None:
    if levels == 0:
        raise ValueError("config is nested too deep")
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _refuse_deep(one, levels - 1)


def _check_fields(found: Manifest) -> None:
    """Raise ValueError for a value that no cache can have."""
    for name, allowed in (("stored_dtype", STORED), ("teacher_dtype", TEACHER_DTYPES), ("format", FORMATS)):
        if getattr(found, name) not in allowed:
            raise ValueError(f"{name} is {getattr(found, name)!r}, not one of {', '.join(allowed)}")
    for name in ("top_k", "vocab_size", "max_length", "batch_tokens"):
        if getattr(found, name) < 1:
            raise ValueError(f"{name} is {getattr(found, name)}, not at least 1")
    if found.vocab_size > _LARGEST_VOCABULARY:
        raise ValueError(f"vocab_size is {found.vocab_size}, more than {_LARGEST_VOCABULARY}")
    if found.mass <= 0:
        raise ValueError("mass is 0")
    if found.truncated > found.rows:
        raise ValueError(f"truncated is {found.truncated}, more than the {found.rows} rows")
    if not found.is_plan and not found.positions <= found.entries <= found.positions * found.top_k:
        raise ValueError(f"entries is {found.entries}, not 1 to {found.top_k} for each of {found.positions} positions")


def _check_shards(found: Manifest) -> None:
    """Raise ValueError unless the shards listed are all there are, in order, with rows in each and none twice."""
    if not found.shards:
        raise ValueError("shards lists none")
    for name, kind in _LISTED.items():
        shards: list[Shard] = getattr(found, name)
        for number, shard in enumerate(shards):
            expected = shard_name(kind, number, len(shards))
            if shard.file != expected:
                raise ValueError(f"{name} lists {shard.file!r} as number {number}, not {expected}")
            if not shard.rows:
                raise ValueError(f"{shard.file} has no rows")
            if not found.is_plan and not (shard.bytes and _SHA256.fullmatch(shard.sha256)):
                raise ValueError(f"{shard.file} has no size or no checksum")
            for row_id, positions, _ in shard.rows:
                # The first token of a forget row has no log-probability: a row of one token has no position there.
                if positions < (kind == "shard"):
                    raise ValueError(f"row {row_id!r} of {shard.file} has no positions")
                if positions > found.max_length:
                    raise ValueError(f"row {row_id!r} of {shard.file} is longer than max_length")
        # A forget row and a retain row may share an id, but not their text as well.
        seen: set[tuple[str, str]] = set()
        for row_id, _, digest in (row for shard in shards for row in shard.rows):
            if (row_id, digest) in seen:
                raise ValueError(f"row {row_id!r} is listed twice")
            seen.add((row_id, digest))
    listed = sum(len(shard.rows) for shard in found.shards), sum(shard.positions for shard in found.shards)
    if (found.rows, found.positions) != listed:
        raise ValueError(
            f"rows and positions are not those of the shards: {found.rows} and {found.positions}, not "
            f"{listed[0]} and {listed[1]}"
        )


def _shard(entry: Any) -> Shard:
    _typed(entry, dict, "shard")
    name = _text(entry["file"], "file")
    rows = [_listed_row(row) for row in _typed(entry["rows"], list, "rows")]
    return Shard(name, _count(entry["bytes"], "bytes"), _text(entry["sha256"], "sha256"), rows)


def _listed_row(row: Any) -> tuple[str, int, str]:
    if len(_typed(row, list, "row")) != 3:
        raise ValueError(f"a row has {len(row)} values, not id, positions and digest")
    row_id, positions, digest = row
    return _text(row_id, "id"), _count(positions, "positions"), _text(digest, "digest")


def _typed(value: Any, wanted: type, name: str) -> Any:
    if type(value) is not wanted:
        raise TypeError(f"{name} is {type(value).__name__}, not {wanted.__name__}")
    return value


def _text(value: Any, name: str) -> str:
    """A text. An escape in JSON can spell half of a surrogate pair, which nobody could print."""
    text: str = _typed(value, str, name)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} {text!r} holds half of a surrogate pair")
    return text


def _count(value: Any, name: str) -> int:
    if not 0 <= _typed(value, int, name) <= _LARGEST:
        raise ValueError(f"{name} is {value}, not in 0 to {_LARGEST}")
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
