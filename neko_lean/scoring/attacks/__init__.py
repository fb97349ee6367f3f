"""Attacks that try to recover the forget set: is it gone, or only hidden? One module per attack."""

# Importing a module registers its attack; the order is that of scores.json and of reports.
from neko_lean.scoring.attacks import prefix, paraphrase, sample, quantize, relearn  # isort: skip
from neko_lean.scoring.attacks.registry import ATTACKS, Attack, AttackTarget, check_attacks, run_attacks

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackTarget",
    "check_attacks",
    "paraphrase",
    "prefix",
    "quantize",
    "relearn",
    "run_attacks",
    "sample",
]
