"""Read and write manifest.json, and validate a plan before the teacher runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neko_lean.cache.format import READABLE_VERSIONS, Manifest
from neko_lean.cache.parsing import MAX_COUNT, parse_manifest
from neko_lean.errors import CacheError, first_line
from neko_lean.outputs import SHA256_HEX, UNSIGNED, is_signed, sign, write_atomically


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest atomically, signed with the SHA-256 of its own bytes."""
    write_atomically(path, manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """A manifest as signed JSON. Raises CacheError naming a text that cannot be encoded as UTF-8."""
    text = json.dumps({**asdict(manifest), "checksum": UNSIGNED}, indent=1, ensure_ascii=False) + "\n"
    try:
        return sign(text.encode())
    except UnicodeEncodeError as error:
        raise CacheError(_encoding_message(manifest, text[error.start])) from error


def _encoding_message(manifest: Manifest, character: str) -> str:
    """Name the text that contains a lone surrogate, as a file name that is not UTF-8 does."""
    if character in manifest.model:
        return f"the name of the teacher's folder, {manifest.model!r}, is not UTF-8 text: rename the folder."
    row_ids = [row_id for shard in manifest.all_shards for row_id, _, _ in shard.rows]
    row_id = next((row_id for row_id in row_ids if character in row_id), None)
    if row_id is not None:
        return f"the id of row {row_id!r} holds {character!r}, half of a surrogate pair: give the row another id."
    return f"the teacher's config.json holds {character!r}, half of a surrogate pair: remove it."


def validate_plan(plan: Manifest) -> Manifest:
    """Check that a plan can be written and read back, so that errors are found before the teacher runs.

    Returns:
        The plan as it will be read back.

    Raises:
        CacheError: if a row has no token, a number is out of range, or a text cannot be encoded as UTF-8.
    """
    # Errors that the user can fix, in terms of the input data and the command line.
    for shards, min_positions in ((plan.shards, 1), (plan.forget_shards, 0)):
        for row_id, positions, _ in (row for shard in shards for row in shard.rows):
            if positions < min_positions:
                raise CacheError(f"row {row_id!r} has no token in this tokenizer: remove it, or give it a text.")
    for option in ("top_k", "max_length", "batch_tokens"):
        value = getattr(plan, option)
        if not 1 <= value <= MAX_COUNT:
            raise CacheError(f"--{option.replace('_', '-')} is {value}: it must be at least 1 and at most {MAX_COUNT}.")
    if not plan.rows:
        raise CacheError("there are no rows to cache: give a retain file that has some.")

    # Everything else that the format does not allow.
    data = manifest_bytes(plan)
    try:
        return parse_manifest(json.loads(data))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"this cache cannot be described by a manifest ({first_line(error)}).") from error


def read_manifest(path: Path) -> Manifest:
    """Read a manifest, and check its version, its checksum, and the type and range of every field.

    Raises:
        CacheError: if the manifest is missing, unreadable, damaged, or of an unknown version.
    """
    if not path.is_file():
        raise CacheError(
            f"{path.parent} holds no {path.name}, so it is not a complete teacher cache: run cache-teacher again."
        )
    data, raw = _read_json_object(path)

    version = raw.get("format_version")
    if version not in READABLE_VERSIONS or isinstance(version, bool):
        writer = raw.get("written_by", "unknown")
        raise CacheError(
            f"{path} has format version {version!r}, written by neko-lean {writer!r}; this one reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}."
        )

    checksum = raw.pop("checksum", None)
    if not isinstance(checksum, str) or not SHA256_HEX.fullmatch(checksum):
        raise CacheError(f"{path} has no valid checksum field: run cache-teacher again.")
    if not is_signed(data, checksum):
        raise CacheError(f"{path} is damaged: its checksum differs; run cache-teacher again.")

    try:
        return parse_manifest(raw)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise CacheError(f"{path} lacks a field or holds one of the wrong type or range ({reason}).") from error


def _read_json_object(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a file, and the JSON object that they encode."""
    try:
        data = path.read_bytes()
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CacheError(f"{path} cannot be read as JSON ({first_line(error)}).") from error
    if not isinstance(raw, dict):
        raise CacheError(f"{path} is not a JSON object.")
    return data, raw
