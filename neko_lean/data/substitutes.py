"""Answers to put in the place of forgotten ones: a refusal, or what belongs to another question."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from neko_lean.data.examples import Example

# Any fixed list does; these are in the manner of TOFU's (arXiv 2401.06121, appendix).
REFUSALS = (
    "I don't know.",
    "I'm not sure.",
    "I have no information on that.",
    "That's beyond what I know.",
    "I can't say.",
    "I am unable to answer that.",
    "I haven't learned about that.",
    "I cannot help with that.",
)


def refusals(forget: Sequence[Example]) -> list[Example]:
    """Each forget row with a refusal as its answer; which one follows from the row's text, so that a cache agrees."""
    return [
        replace(row, id=f"refusal {row.id}", output=REFUSALS[int(row.digest, 16) % len(REFUSALS)]) for row in forget
    ]


def random_answers(forget: Sequence[Example], retain: Sequence[Example], seed: int) -> list[Example]:
    """Each forget row with the answer of a random retain row of its kind, sc or qa (the mismatch of arXiv 2310.10683,
    eq. 3, which NEKO had to leave out for want of memory)."""
    rng = random.Random(f"{seed} random answers")
    answers = {kind: [row.output for row in retain if row.kind == kind] for kind in ("sc", "qa")}
    every = [row.output for row in retain]
    return [replace(row, id=f"random {row.id}", output=rng.choice(answers[row.kind] or every)) for row in forget]
