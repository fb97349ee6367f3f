"""The cache's manifest and constants; FORMAT.md beside this file says what each field means."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from neko_lean.models import config_differences

FORMAT_VERSION = 2


READABLE = (1, 2)  # format versions; 1 has no `config`


SCALE = 2.0**15  # stored probabilities are p * SCALE: float16 then holds p >= 1.9e-9 with 11 bits


STORED = {"float16": "F16", "float32": "F32"}  # dtypes of scaled_p, and what safetensors calls them


TEACHER_DTYPES = ("float32", "bfloat16")


_LISTED = {"shards": "shard", "forget_shards": "forget"}  # fields that list shards, and what the names begin with


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


def differences(old: Manifest, new: Manifest) -> list[str]:
    """Names of the fields in which two manifests differ; of the teacher's config, its keys with both values.

    What format version 1 does not say is not compared.
    """
    names = [f.name for f in fields(Manifest) if f.name not in ("config", "format_version")]
    found = [name for name in names if getattr(old, name) != getattr(new, name)]
    if old.config is not None and new.config is not None:
        found += config_differences(old.config, new.config)
    return found
