"""Parse a cache manifest from JSON, and check every field against FORMAT.md."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from neko_lean.cache.format import SHARD_KINDS, STORED_DTYPES, TEACHER_DTYPES, Manifest, Shard, shard_name
from neko_lean.data import is_recorded_format
from neko_lean.outputs import SHA256_HEX

MAX_COUNT = 2**48  # larger counts are certainly wrong

_MAX_VOCAB_SIZE = 2**31  # token ids are stored as int32

_MAX_CONFIG_DEPTH = 16  # nested objects and lists


def parse_manifest(raw: dict[str, Any]) -> Manifest:
    """Convert the JSON object of a manifest, without its checksum, to a Manifest.

    Raises:
        KeyError: if a field is missing.
        TypeError: if a field has the wrong type.
        ValueError: if a field has a value that FORMAT.md does not allow.
    """
    values = {item.name: _parse_field(item.name, item.type, raw) for item in fields(Manifest)}
    manifest = Manifest(**values)
    _check_shards(manifest)
    _check_fields(manifest)
    return manifest


def _parse_field(name: str, annotation: Any, raw: dict[str, Any]) -> Any:
    """Parse one field of a manifest. `annotation` is the type of the Manifest field, as text."""
    if name == "config":
        return _parse_config(raw)
    if name == "shots" and raw["format_version"] < 3:
        return 0
    value = raw[name]
    if name in SHARD_KINDS:
        return [_parse_shard(entry) for entry in _typed(value, list, name)]
    if annotation == "int":
        return _count(value, name)
    if annotation == "float":
        return _fraction(value, name)
    return _text(value, name)


def _parse_config(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The teacher's config, which format version 1 does not have."""
    if raw["format_version"] == 1:
        return None
    config: dict[str, Any] = _typed(raw["config"], dict, "config")
    _check_depth(config, _MAX_CONFIG_DEPTH)
    return config


def _check_depth(value: Any, levels: int) -> None:
    """Raise ValueError if lists and objects are nested in more than `levels` levels."""
    if levels == 0:
        raise ValueError("config is nested too deep")
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            _check_depth(child, levels - 1)


def _parse_shard(entry: Any) -> Shard:
    _typed(entry, dict, "shard")
    name = _text(entry["file"], "file")
    rows = [_parse_row(row) for row in _typed(entry["rows"], list, "rows")]
    return Shard(name, _count(entry["bytes"], "bytes"), _text(entry["sha256"], "sha256"), rows)


def _parse_row(row: Any) -> tuple[str, int, str]:
    if len(_typed(row, list, "row")) != 3:
        raise ValueError(f"a row has {len(row)} values, not id, positions and digest")
    row_id, positions, digest = row
    return _text(row_id, "id"), _count(positions, "positions"), _text(digest, "digest")


def _typed(value: Any, expected: type, name: str) -> Any:
    if type(value) is not expected:
        raise TypeError(f"{name} is {type(value).__name__}, not {expected.__name__}")
    return value


def _text(value: Any, name: str) -> str:
    """A string without lone surrogates, which JSON escapes can spell but which cannot be encoded as UTF-8."""
    text: str = _typed(value, str, name)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} {text!r} holds half of a surrogate pair")
    return text


def _count(value: Any, name: str) -> int:
    if not 0 <= _typed(value, int, name) <= MAX_COUNT:
        raise ValueError(f"{name} is {value}, not in 0 to {MAX_COUNT}")
    return int(value)


def _fraction(value: Any, name: str) -> float:
    """A float from 0 to 1, plus the rounding error of a sum of probabilities."""
    fraction: float = _typed(value, float, name)
    if not (math.isfinite(fraction) and 0 <= fraction <= 1 + 1e-6):
        raise ValueError(f"{name} is {fraction}, not in 0 to 1")
    return fraction


def _check_fields(manifest: Manifest) -> None:
    """Raise ValueError for a value that is impossible in a cache."""
    for name, allowed in (("stored_dtype", STORED_DTYPES), ("teacher_dtype", TEACHER_DTYPES)):
        if getattr(manifest, name) not in allowed:
            raise ValueError(f"{name} is {getattr(manifest, name)!r}, not one of {', '.join(allowed)}")
    if not is_recorded_format(manifest.format):
        raise ValueError(f"format is {manifest.format!r}, not a prompt format")
    for name in ("top_k", "vocab_size", "max_length", "batch_tokens"):
        if getattr(manifest, name) < 1:
            raise ValueError(f"{name} is {getattr(manifest, name)}, not at least 1")
    if manifest.vocab_size > _MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {manifest.vocab_size}, more than {_MAX_VOCAB_SIZE}")
    if manifest.mass <= 0:
        raise ValueError("mass is 0")
    if manifest.truncated > manifest.rows:
        raise ValueError(f"truncated is {manifest.truncated}, more than the {manifest.rows} rows")
    entries, positions, top_k = manifest.entries, manifest.positions, manifest.top_k
    if not manifest.is_plan and not positions <= entries <= positions * top_k:
        raise ValueError(f"entries is {entries}, not 1 to {top_k} for each of {positions} positions")


def _check_shards(manifest: Manifest) -> None:
    """Raise ValueError unless the listed shards are complete, in order, and contain every row once."""
    if not manifest.shards:
        raise ValueError("shards lists none")
    for name, kind in SHARD_KINDS.items():
        shards: list[Shard] = getattr(manifest, name)
        for number, shard in enumerate(shards):
            expected = shard_name(kind, number, len(shards))
            if shard.file != expected:
                raise ValueError(f"{name} lists {shard.file!r} as number {number}, not {expected}")
            # The first token of a forget row has no log-probability, so a row of one token has no positions there.
            _check_shard(shard, manifest, min_positions=0 if kind == "forget" else 1)
        _check_no_duplicates(shards)

    rows = sum(len(shard.rows) for shard in manifest.shards)
    positions = sum(shard.positions for shard in manifest.shards)
    if (manifest.rows, manifest.positions) != (rows, positions):
        raise ValueError(
            f"rows and positions are not those of the shards: {manifest.rows} and {manifest.positions}, not "
            f"{rows} and {positions}"
        )


def _check_shard(shard: Shard, manifest: Manifest, min_positions: int) -> None:
    if not shard.rows:
        raise ValueError(f"{shard.file} has no rows")
    if not manifest.is_plan and not (shard.bytes and SHA256_HEX.fullmatch(shard.sha256)):
        raise ValueError(f"{shard.file} has no size or no checksum")
    for row_id, positions, _ in shard.rows:
        if positions < min_positions:
            raise ValueError(f"row {row_id!r} of {shard.file} has no positions")
        if positions > manifest.max_length:
            raise ValueError(f"row {row_id!r} of {shard.file} is longer than max_length")


def _check_no_duplicates(shards: list[Shard]) -> None:
    """Rows may share an id, but not the text as well."""
    seen: set[tuple[str, str]] = set()
    for row_id, _, digest in (row for shard in shards for row in shard.rows):
        if (row_id, digest) in seen:
            raise ValueError(f"row {row_id!r} is listed twice")
        seen.add((row_id, digest))
