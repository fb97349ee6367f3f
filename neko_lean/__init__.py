"""neko-lean: machine unlearning of language models with one model in memory. The frozen teacher is a cache on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from neko_lean.cache import CacheOptions, cache_teacher
    from neko_lean.errors import Interrupted, NekoLeanError
    from neko_lean.options import OutputOptions, RunOptions
    from neko_lean.runs import memorize, unlearn
    from neko_lean.scoring import ScoreInputs, ScoreSettings, score

__all__ = [
    "CacheOptions",
    "Interrupted",
    "NekoLeanError",
    "OutputOptions",
    "RunOptions",
    "ScoreInputs",
    "ScoreSettings",
    "cache_teacher",
    "memorize",
    "score",
    "unlearn",
]

_PACKAGE_OF = {
    "CacheOptions": "neko_lean.cache",
    "Interrupted": "neko_lean.errors",
    "NekoLeanError": "neko_lean.errors",
    "OutputOptions": "neko_lean.options",
    "RunOptions": "neko_lean.options",
    "ScoreInputs": "neko_lean.scoring",
    "ScoreSettings": "neko_lean.scoring",
    "cache_teacher": "neko_lean.cache",
    "memorize": "neko_lean.runs",
    "score": "neko_lean.scoring",
    "unlearn": "neko_lean.runs",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `neko-lean --help` must not wait for torch and transformers.
    if name not in _PACKAGE_OF:
        raise AttributeError(f"module 'neko_lean' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PACKAGE_OF[name]), name)
