"""The size of the teacher cache on disk, from the bytes that its format takes per position."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from neko_lean.cache.format import id_dtype
from neko_lean.options import CacheOptions
from neko_lean.recipe import Recipe, needs_teacher

# Offsets, the tail and the loss of the token: what a position takes in addition to its entries.
POSITION_BYTES = 12

MEASURED = "29 to 101 bytes were measured with a vocabulary of 2048 (docs/cache.md)"


def cache_size(recipe: Recipe, config: PreTrainedConfig) -> dict[str, Any] | None:
    """Size of the cache that `unlearn` makes for a recipe.

    Returns:
        The largest `bytes_per_position`, `rows` (1000) and the `bytes` of so many retain rows of full length, or None
        if the recipe reads no cache. Most caches are smaller, because a position stores no more entries than `mass`
        needs.
    """
    if not needs_teacher(recipe):
        return None
    options = CacheOptions()
    vocab_size = int(config.get_text_config().vocab_size)
    entry = np.dtype(id_dtype(vocab_size)).itemsize + np.dtype(options.stored_dtype).itemsize
    per_position = POSITION_BYTES + entry * min(options.top_k, vocab_size)
    rows = 1000
    return {
        "bytes_per_position": per_position,
        "rows": rows,
        "bytes": rows * recipe.max_length * per_position,
        "measured": MEASURED,
    }
