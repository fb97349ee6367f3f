"""The encoded examples of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neko_lean.data import EncodedExample


@dataclass(frozen=True)
class TrainingExamples:
    """What a trainer draws its batches from.

    Args:
        forget: examples to forget; may be empty.
        retain: examples whose behaviour is preserved, anchor documents included; may be empty.
        substitutes: for each forget example, the same prompt with another answer; or None.
    """

    forget: Sequence[EncodedExample]
    retain: Sequence[EncodedExample]
    substitutes: Sequence[EncodedExample] | None = None
