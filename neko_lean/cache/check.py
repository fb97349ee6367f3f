"""What a cache is and whether it is right: its numbers, its checksums and invariants, and a live teacher beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from neko_lean.cache.format import Manifest
from neko_lean.cache.reader import TeacherCache
from neko_lean.cache.teacher import hidden_states
from neko_lean.cache.writer import teacher_batches
from neko_lean.data import encode, read_rows
from neko_lean.errors import CacheError, NekoLeanError
from neko_lean.models import (
    identify,
    load_model,
    load_tokenizer,
    model_folder,
    pick_device,
    pick_dtype,
    token_stats,
    usable_length,
)

# Largest mean KL that rounding explains. In float32 the rest is float16's; a bfloat16 forward differs between machines.
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-3}


def inspect_cache(folder: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """What a cache was made from and what is in it; with `verify` every file is checked.

    Returns the manifest's fields but for the rows, and: bytes; bytes_per_token; entries_per_token (a histogram, e.g.
    {'1': share, '2': .., '3-4': ..}); mean_entries; mean_tail_mass; mean_entropy in nats (of the stored distribution
    with its tail as one bucket, a lower bound for the teacher's). Raises CacheError naming the first bad shard.
    """
    cache = TeacherCache(folder)
    if verify:
        cache.verify()
    made = cache.manifest
    sizes, tail_mass, entropy = [], 0.0, 0.0
    for counts, _, p, tail in cache.sweep():
        sizes.append(counts)
        t = np.exp(tail.astype(np.float64))
        tail_mass += t.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy -= np.where(p > 0, p * np.log(p), 0).sum(dtype=np.float64) + np.where(t > 0, t * tail, 0).sum()
    counts = np.concatenate(sizes)
    size = sum(shard.bytes for shard in made.shards)
    listed = ("shards", "forget_shards")
    return {
        **{key: value for key, value in vars(made).items() if key not in listed},
        **{
            key: [{"file": s.file, "bytes": s.bytes, "rows": len(s.rows)} for s in getattr(made, key)] for key in listed
        },
        "bytes": size + sum(shard.bytes for shard in made.forget_shards),
        "bytes_per_token": size / made.positions,
        "entries_per_token": _histogram(counts),
        "mean_entries": float(counts.mean()),
        "mean_tail_mass": float(tail_mass / made.positions),
        "mean_entropy": float(entropy / made.positions),
    }


def _histogram(counts: np.ndarray) -> dict[str, float]:
    """Share of positions by number of entries, in buckets that double: 1, 2, 3-4, 5-8, ..."""
    bucket = np.ceil(np.log2(counts)).astype(int)
    shares = np.bincount(bucket) / len(counts)
    return {
        (f"{2**i // 2 + 1}-{2**i}" if i > 1 else str(2**i)): float(share) for i, share in enumerate(shares) if share
    }


def check_cache(
    folder: str | Path, model: str | Path, retain: str | Path, rows: int, *, device: str | None = None
) -> dict[str, float]:
    """Compute at least `rows` retain rows again with the live teacher and compare.

    The rows are taken a batch at a time, as they were when the cache was written, evenly over all lengths.

    Returns rows, positions, kl_mean and kl_max (KL of the stored to the live distribution, nats a position), mass_mean
    and mass_1st_percentile (probability inside the entries). Raises CacheError when the mean KL is more than rounding.
    """
    if rows < 1:
        raise NekoLeanError("--check wants at least 1 row.")
    cache, path = TeacherCache(folder), model_folder(model)
    made: Manifest = cache.manifest
    tokenizer = load_tokenizer(path)
    encoded = encode(read_rows(retain, "retain"), tokenizer, made.format, usable_length(path, made.max_length))
    cache.check(
        identify(path, tokenizer),
        style=made.format,
        max_length=made.max_length,
        encoded=encoded,
    )
    teacher = load_model(path, pick_dtype(made.teacher_dtype), pick_device(device))
    teacher.model.eval()
    cache.check_vocabulary(len(teacher.head))
    batches = teacher_batches(encoded, made.batch_tokens)
    wanted = min(rows, len(encoded))
    kls, masses, seen = [], [], 0
    # The first batch, then the middle one, the quarters, and so on: any number of rows covers all lengths.
    for index in sorted(range(len(batches)), key=lambda i: int(f"{i:020b}"[::-1], 2)):
        if seen >= wanted:
            break
        batch = batches[index]
        ids, logp, tail = (part.to(teacher.device) for part in cache.read(batch))
        hidden = hidden_states(teacher, batch, int(tokenizer.pad_token_id))
        nothing = torch.full((len(hidden),), -1, device=teacher.device)
        with torch.no_grad():
            stats = token_stats(hidden, teacher.head, nothing, ids, logp, tail, transform=teacher.transform)
        kls.append(stats[1].double().cpu().numpy())
        masses.append(-np.expm1(tail.double().cpu().numpy()))
        seen += len(batch)
    kl, mass = np.concatenate(kls), np.concatenate(masses)
    found = {
        "rows": seen,
        "positions": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "mass_mean": float(mass.mean()),
        "mass_1st_percentile": float(np.percentile(mass, 1)),
    }
    if not abs(found["kl_mean"]) <= ROUNDING[made.teacher_dtype]:
        raise CacheError(
            f"{folder} is not what its teacher says: over {seen} rows the KL of cache to teacher is "
            f"{found['kl_mean']:.2e} nats a position, more than rounding explains."
        )
    return found
