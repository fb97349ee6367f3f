"""Options that decide what a teacher cache contains."""

from __future__ import annotations

from dataclasses import dataclass

from neko_lean.options import option


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What the teacher runs in, and which of its probabilities are stored.

    Attributes:
        top_k: maximum number of entries per position. With `top_k >= vocab_size` and `mass=1`, all tokens are stored.
        mass: each position stores the fewest most likely tokens whose probabilities sum to this value, at most `top_k`
            of them; in (0, 1]. With 1, every position stores `top_k` tokens.
        format: prompt format, 'plain' or 'neko'. The recipe that reads the cache must use the same format.
        max_length: examples are truncated to this many tokens.
        batch_tokens: number of positions per forward pass, padding included.
        dtype: dtype that the teacher runs in, 'bfloat16' or 'float32'.
        stored_dtype: dtype of the stored probabilities, 'float16' (relative error at most 2^-11) or 'float32'.
    """

    top_k: int = option(64, "Maximum number of entries per position.")
    mass: float = option(
        0.999, "Store the fewest most likely tokens whose probabilities sum to this value; 1 always stores --top-k."
    )
    format: str = option("plain", "Prompt format, plain or neko; the recipe must use the same format.")
    max_length: int = option(512, "Truncate examples to this many tokens.")
    batch_tokens: int = option(8192, "Positions per forward pass, padding included.")
    dtype: str = option("bfloat16", "Dtype that the teacher runs in: bfloat16 or float32.")
    stored_dtype: str = option("float16", "Dtype of the stored probabilities: float16 or float32.")
