"""Settings of a teacher cache."""

from __future__ import annotations

from dataclasses import dataclass

from neko_lean.options import option


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How the teacher is run, and how much of its distributions is stored."""

    top_k: int = option(64, "Most entries stored for a position.")
    mass: float = option(
        0.999, "Store only as many of the most likely tokens as reach this probability; 1 stores top-k always."
    )
    format: str = option("plain", "Prompt format, plain or neko; training must use the same.")
    max_length: int = option(512, "Tokens to which an example is truncated.")
    batch_tokens: int = option(8192, "Most tokens of one forward pass.")
    dtype: str = option("bfloat16", "Dtype of the teacher: bfloat16 or float32.")
    stored_dtype: str = option("float16", "Dtype of the stored probabilities: float16 or float32.")
