"""The commands `unlearn` and `memorize` as functions."""

from neko_lean.runs.memorizing import memorize
from neko_lean.runs.unlearning import unlearn

__all__ = ["memorize", "unlearn"]
