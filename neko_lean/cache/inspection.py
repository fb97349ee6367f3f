"""Describe a cache: what it was made from, its size, and how its entries are distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from neko_lean.cache.format import SHARD_KINDS
from neko_lean.cache.reader import TeacherCache


def inspect_cache(folder: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Describe a cache.

    Args:
        folder: folder that `cache_teacher` wrote.
        verify: also check every file in it.

    Returns:
        The fields of the manifest, with `file`, `bytes` and the number of `rows` for each shard, and

        - `bytes`: size of all shards.
        - `bytes_per_token`: size of the retain shards per position.
        - `entries_per_token`: a histogram such as {'1': 0.7, '2': 0.2, '3-4': 0.1}, in shares of all positions.
        - `mean_entries`, `mean_tail_mass`: means over positions.
        - `mean_entropy`: mean entropy in nats of the stored distributions. Each has its tail as a single token, so this
          is a lower bound of the teacher's entropy.

    Raises:
        CacheError: if the cache is damaged; names the first bad file.

    Example::

        about = inspect_cache("cache/", verify=True)
        print(f"{about['positions']} tokens, {about['bytes_per_token']:.1f} bytes per token")
    """
    cache = TeacherCache(folder)
    if verify:
        cache.verify()

    # Sum over all positions.
    sizes, tail_mass, entropy = [], 0.0, 0.0
    for positions in cache.sweep():
        p, tail_logp = positions.p, positions.tail_logp
        tail_p = np.exp(tail_logp.astype(np.float64))
        sizes.append(positions.sizes)
        tail_mass += tail_p.sum()
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 is 0
            entries_term = np.where(p > 0, p * np.log(p), 0).sum(dtype=np.float64)
            tail_term = np.where(tail_p > 0, tail_p * tail_logp, 0).sum()
        entropy -= entries_term + tail_term

    manifest = cache.manifest
    counts = np.concatenate(sizes)
    retain_bytes = sum(shard.bytes for shard in manifest.shards)
    return {
        **{key: value for key, value in vars(manifest).items() if key not in SHARD_KINDS},
        **{
            key: [
                {"file": shard.file, "bytes": shard.bytes, "rows": len(shard.rows)} for shard in getattr(manifest, key)
            ]
            for key in SHARD_KINDS
        },
        "bytes": sum(shard.bytes for shard in manifest.all_shards),
        "bytes_per_token": retain_bytes / manifest.positions,
        "entries_per_token": _histogram(counts),
        "mean_entries": float(counts.mean()),
        "mean_tail_mass": float(tail_mass / manifest.positions),
        "mean_entropy": float(entropy / manifest.positions),
    }


def _histogram(counts: np.ndarray) -> dict[str, float]:
    """Share of positions by number of entries, in buckets of doubling width: 1, 2, 3-4, 5-8, ..."""
    bucket = np.ceil(np.log2(counts)).astype(int)
    shares = np.bincount(bucket) / len(counts)
    labels = [str(2**power) if power < 2 else f"{2**power // 2 + 1}-{2**power}" for power in range(len(shares))]
    return {label: float(share) for label, share in zip(labels, shares, strict=True) if share}
