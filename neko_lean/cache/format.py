"""The data structures and constants of the cache format, which FORMAT.md specifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from neko_lean.models import config_differences

FORMAT_VERSION = 3

SELF_GENERATED = "self_generated.jsonl"  # the retain set, if the teacher wrote it

READABLE_VERSIONS = (1, 2, 3)  # version 1 has no `config`, and only version 3 has `shots`

SCALE = 2.0**15  # stored probabilities are p * SCALE, so that float16 holds p >= 1.9e-9 with 11 significant bits

STORED_DTYPES = {"float16": "F16", "float32": "F32"}  # dtypes of scaled_p, and their names in safetensors

TEACHER_DTYPES = ("float32", "bfloat16")

SHARD_KINDS = {"shards": "shard", "forget_shards": "forget"}  # manifest field -> prefix of its file names


@dataclass(frozen=True)
class Shard:
    """One file of the cache.

    Attributes:
        file: file name.
        bytes: file size; 0 in a plan.
        sha256: checksum of the file; empty in a plan.
        rows: (id, number of positions, digest) of each example, in the order in which the file stores them.
    """

    file: str
    bytes: int
    sha256: str
    rows: list[tuple[str, int, str]]

    @property
    def positions(self) -> int:
        return sum(positions for _, positions, _ in self.rows)


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json, except its checksum. FORMAT.md describes each field."""

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
    config: dict[str, Any] | None = None  # None in format version 1
    shots: int = 0  # 0 before format version 3
    format_version: int = FORMAT_VERSION

    @property
    def all_shards(self) -> list[Shard]:
        return [*self.shards, *self.forget_shards]

    @property
    def is_plan(self) -> bool:
        """Whether the shards have not been written yet: all sizes, checksums and totals are 0 or empty."""
        return not (self.entries or self.mean_mass or any(shard.bytes or shard.sha256 for shard in self.all_shards))


def shard_name(kind: str, number: int, count: int) -> str:
    """File name of a shard, such as shard-00000-of-00003.safetensors. `kind` is a value of SHARD_KINDS."""
    return f"{kind}-{number:05d}-of-{count:05d}.safetensors"


def id_dtype(vocab_size: int) -> type[np.generic]:
    """The narrowest dtype of the format that holds every token id."""
    return np.uint16 if vocab_size <= 65536 else np.int32


def without_results(manifest: Manifest) -> Manifest:
    """The plan that a complete manifest was made from."""

    def planned(shards: Sequence[Shard]) -> list[Shard]:
        return [replace(shard, bytes=0, sha256="") for shard in shards]

    return replace(
        manifest,
        entries=0,
        mean_mass=0.0,
        shards=planned(manifest.shards),
        forget_shards=planned(manifest.forget_shards),
    )


def differences(old: Manifest, new: Manifest) -> list[str]:
    """Compare two manifests.

    Returns:
        The names of the fields that differ. Keys of the teacher's config are listed one by one, with both values. The
        config is skipped if one of the manifests has format version 1, which does not record it.
    """
    names = [item.name for item in fields(Manifest) if item.name not in ("config", "format_version")]
    changed = [name for name in names if getattr(old, name) != getattr(new, name)]
    if old.config is not None and new.config is not None:
        changed += config_differences(old.config, new.config)
    return changed
