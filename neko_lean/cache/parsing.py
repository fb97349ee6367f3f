"""Check every field of a cache manifest, and build it from JSON."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from neko_lean.cache.format import _LISTED, STORED, TEACHER_DTYPES, Manifest, Shard, shard_name
from neko_lean.data import FORMATS
from neko_lean.outputs import SHA256_HEX

_LARGEST = 2**48  # no count in a manifest can honestly be larger


_LARGEST_VOCABULARY = 2**31  # ids are stored as int32


_DEEPEST = 16  # objects and lists inside each other in `config`


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
            if not found.is_plan and not (shard.bytes and SHA256_HEX.fullmatch(shard.sha256)):
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
