"""Records of the shards that a run has written, from which a resumed run tells complete shards from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from neko_lean.cache.format import Shard
from neko_lean.errors import CacheError
from neko_lean.outputs import file_sha256, write_atomically


@dataclass(frozen=True)
class ShardRecord:
    """What was written as a shard. Size and checksum are those of the bytes in memory, not of the file.

    Attributes:
        bytes: size of the shard.
        sha256: its checksum.
        entries: number of entries; 0 for a forget shard.
        captured: sum over positions of the probability inside the entries; 0 for a forget shard.
    """

    bytes: int
    sha256: str
    entries: int = 0
    captured: float = 0.0


def record_path(stage: Path, shard: Shard) -> Path:
    """The file in the work folder that records a shard."""
    return stage / f"{shard.file}.json"


def write_shard(stage: Path, shard: Shard, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a shard's tensors, and then its record."""
    data = save(dict(tensors))
    write_atomically(stage / shard.file, data)
    record = ShardRecord(len(data), hashlib.sha256(data).hexdigest(), *_totals(tensors))
    write_atomically(record_path(stage, shard), json.dumps(asdict(record)) + "\n")


def _totals(tensors: Mapping[str, np.ndarray]) -> tuple[int, float]:
    """The number of entries of a shard, and the probability inside them, summed over positions."""
    if "ids" not in tensors:
        return 0, 0.0
    return len(tensors["ids"]), float(-np.expm1(tensors["tail_logp"].astype(np.float64)).sum())


def read_record(stage: Path, shard: Shard) -> ShardRecord:
    """The record of a shard. Raises CacheError if it is missing or unreadable."""
    path = record_path(stage, shard)
    try:
        return ShardRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, RecursionError) as error:
        raise CacheError(f"{path} is not a readable record of {shard.file}: run again with --resume.") from error


def is_written(stage: Path, shard: Shard) -> bool:
    """Whether a shard exists and has the size and checksum that its record states."""
    path = stage / shard.file
    try:
        record = read_record(stage, shard)
        return path.stat().st_size == record.bytes and file_sha256(path) == record.sha256
    except (FileNotFoundError, CacheError):
        return False
