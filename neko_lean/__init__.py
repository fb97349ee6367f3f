"""neko-lean: machine unlearning of language models with one model in memory. The frozen teacher is a cache on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from neko_lean.cache.writer import cache_teacher
    from neko_lean.errors import Interrupted
    from neko_lean.runs.unlearn import memorize, unlearn
    from neko_lean.scoring.run import score

__all__ = ["Interrupted", "cache_teacher", "memorize", "score", "unlearn"]

_HOME = {
    "Interrupted": "neko_lean.errors",
    "cache_teacher": "neko_lean.cache",
    "memorize": "neko_lean.runs",
    "score": "neko_lean.scoring",
    "unlearn": "neko_lean.runs",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `neko-lean --help` must not wait for torch and transformers.
    if name not in _HOME:
        raise AttributeError(f"module 'neko_lean' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
