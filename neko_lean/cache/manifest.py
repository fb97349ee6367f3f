"""Read and write manifest.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from neko_lean.cache.format import READABLE, Manifest
from neko_lean.cache.parsing import _LARGEST, parse_manifest
from neko_lean.errors import CacheError, first_line
from neko_lean.outputs import SHA256_HEX, UNSIGNED, is_signed, sign, write_atomically


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
    if not isinstance(checksum, str) or not SHA256_HEX.fullmatch(checksum):
        raise CacheError(f"{path} lacks its checksum, or holds one of the wrong type.")
    if not is_signed(data, checksum):
        raise CacheError(f"{path} is damaged: its checksum differs; run cache-teacher again.")
    try:
        return parse_manifest(raw)
    except (KeyError, TypeError, ValueError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise CacheError(f"{path} lacks a field or holds one of the wrong type or range ({what}).") from error
