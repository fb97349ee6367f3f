"""The score: the shared task's own arithmetic over greedy generations, and membership inference."""

from neko_lean.scoring.run import score

__all__ = ["score"]
