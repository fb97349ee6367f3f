"""Verify a whole cache: every checksum, every number, the totals, and that there are no other files."""

from __future__ import annotations

import numpy as np

from neko_lean.cache.format import SELF_GENERATED
from neko_lean.cache.shards import ShardReader
from neko_lean.errors import CacheError
from neko_lean.outputs import MANIFEST


def verify_numbers(shards: ShardReader) -> None:
    """Read and check every shard, and the totals in the manifest.

    Raises:
        CacheError: names the first file in which something is wrong.
    """
    manifest, path = shards.manifest, shards.folder / MANIFEST
    entries, tail_mass = 0, 0.0
    for positions in shards.sweep():
        entries += int(positions.sizes.sum())
        tail_mass += float(np.exp(positions.tail_logp.astype(np.float64)).sum())
    for shard in manifest.forget_shards:
        shards.target_logp(shard, 0, shard.positions)

    mean_mass = 1 - tail_mass / manifest.positions
    if entries != manifest.entries:
        raise CacheError(f"{path} says {manifest.entries} entries, but the shards hold {entries}.")
    if not abs(mean_mass - manifest.mean_mass) <= 1e-6:
        raise CacheError(
            f"{path} says a mean_mass of {manifest.mean_mass:.7f}, but that of the shards is {mean_mass:.7f}."
        )


def verify_files(shards: ShardReader) -> None:
    """Raise CacheError if the folder contains a file that is not part of the cache."""
    known = {MANIFEST, SELF_GENERATED, *(shard.file for shard in shards.manifest.all_shards)}
    unknown = sorted(path.name for path in shards.folder.iterdir() if path.name not in known)
    if unknown:
        raise CacheError(f"{shards.folder} holds {unknown[0]!r}, which is not part of the cache: remove it.")
