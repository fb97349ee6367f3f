"""The examples of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from neko_lean.data import EncodedExample


@dataclass(frozen=True)
class TrainingExamples:
    """What a run trains on. Batches refer to examples by their index in these sequences."""

    forget: Sequence[EncodedExample] = field(default=())
    """Forget set: examples that the student is trained to forget. Empty for `memorize`."""

    retain: Sequence[EncodedExample] = field(default=())
    """Retain set: examples whose behaviour is preserved (or, for `memorize`, that are learned)."""

    substitutes: Sequence[EncodedExample] = field(default=())
    """The forget set with other answers, one example for each of `forget`; empty if the recipe uses none."""

    anchor_count: int = 0
    """How many of the last examples of `retain` are the anchor's."""
