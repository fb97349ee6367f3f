"""neko-lean: machine unlearning of language models with one model in memory. The frozen teacher is a cache on disk.

The functions take a checkpoint folder, a hub name or a loaded transformers model, and data sets as paths, lists of
dicts, DataFrames or Datasets:

    from neko_lean import cache_teacher, report, score, unlearn

    cache_teacher(model, "cache/", retain="data/")
    unlearn(model, "unlearned/", forget="data/", retain="data/", cache="cache/")
    score("unlearned/", "scores/", data="data/")
    report(["scores/", "unlearned/"], "report.html")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from neko_lean.cache import CacheOptions, cache_teacher
    from neko_lean.errors import Interrupted, NekoLeanError
    from neko_lean.memory import plan
    from neko_lean.options import OutputOptions, RunOptions, ScoreInputs, ScoreSettings, TrainingOptions
    from neko_lean.recipe import Recipe, recipes
    from neko_lean.reporting import report
    from neko_lean.runs import memorize, unlearn
    from neko_lean.scoring import score

__all__ = [
    "CacheOptions",
    "Interrupted",
    "NekoLeanError",
    "OutputOptions",
    "Recipe",
    "RunOptions",
    "ScoreInputs",
    "ScoreSettings",
    "TrainingOptions",
    "cache_teacher",
    "memorize",
    "plan",
    "recipes",
    "report",
    "score",
    "unlearn",
]

_MODULE_OF = {
    "CacheOptions": "neko_lean.options",
    "Interrupted": "neko_lean.errors",
    "NekoLeanError": "neko_lean.errors",
    "OutputOptions": "neko_lean.options",
    "Recipe": "neko_lean.recipe",
    "RunOptions": "neko_lean.options",
    "ScoreInputs": "neko_lean.options",
    "ScoreSettings": "neko_lean.options",
    "TrainingOptions": "neko_lean.options",
    "cache_teacher": "neko_lean.cache",
    "memorize": "neko_lean.runs",
    "plan": "neko_lean.memory",
    "recipes": "neko_lean.recipe",
    "report": "neko_lean.reporting",
    "score": "neko_lean.scoring",
    "unlearn": "neko_lean.runs",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `neko-lean --help` must not wait for torch and transformers.
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'neko_lean' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
