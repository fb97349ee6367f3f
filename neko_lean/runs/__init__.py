"""The `unlearn` and `memorize` commands as functions."""

from neko_lean.runs.unlearn import memorize, unlearn

__all__ = ["memorize", "unlearn"]
