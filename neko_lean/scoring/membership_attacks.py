"""Membership inference attacks: one function each, from a document's view to a score.

An attack expects a lower score for a member (a document the model was trained on) than for a non-member, as with a
loss. To add one, write a function of a ScoredDocument and register it here; tables and reports pick it up.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from neko_lean.scoring.views import View

MIN_K = 0.2  # share of a document's tokens that min-k looks at


@dataclass(frozen=True)
class ReferenceLoss:
    """A document's mean token loss under a reference model, and under the scored model on the same tokens."""

    reference: float
    model: float


@dataclass(frozen=True)
class ScoredDocument:
    """What an attack knows of a document: its text, as far as the model read it, and the model's view of it."""

    text: str
    view: View
    reference: ReferenceLoss | None = None


@dataclass(frozen=True)
class MembershipAttack:
    """A registered attack.

    Attributes:
        name: its key in documents.jsonl and scores.json.
        label: its name in reports.
        description: one phrase for reports.
        score: computes a document's score; lower for members.
        needs_reference: whether it needs `ScoredDocument.reference`.
    """

    name: str
    label: str
    description: str
    score: Callable[[ScoredDocument], float]
    needs_reference: bool


MEMBERSHIP_ATTACKS: dict[str, MembershipAttack] = {}


def membership_attack(
    name: str, label: str, description: str, *, needs_reference: bool = False
) -> Callable[[Callable[[ScoredDocument], float]], Callable[[ScoredDocument], float]]:
    """Register a function as a membership attack; see MembershipAttack for the arguments."""

    def register(score: Callable[[ScoredDocument], float]) -> Callable[[ScoredDocument], float]:
        MEMBERSHIP_ATTACKS[name] = MembershipAttack(name, label, description, score, needs_reference)
        return score

    return register


def attack_scores(document: ScoredDocument) -> dict[str, float]:
    """The document's score in every attack whose requirements are met."""
    return {
        attack.name: float(attack.score(document))
        for attack in MEMBERSHIP_ATTACKS.values()
        if document.reference is not None or not attack.needs_reference
    }


@membership_attack("loss", "loss", "mean token loss of the whole document")
def loss(document: ScoredDocument) -> float:
    """Mean token loss (Yeom et al. 2018, arXiv 1709.01604); the attack of the shared task."""
    return float(-document.view.logp.mean())


@membership_attack("zlib", "zlib", "total loss divided by the compressed size of the text")
def compression(document: ScoredDocument) -> float:
    """Total loss over the number of bytes that the text compresses to (Carlini et al. 2021, arXiv 2012.07805)."""
    return float(-document.view.logp.sum() / len(zlib.compress(document.text.encode())))


@membership_attack("min_k", "min-k", "mean loss of the 20 % least likely tokens")
def min_k(document: ScoredDocument) -> float:
    """Mean loss of the least likely fifth of the tokens (Shi et al. 2024, arXiv 2310.16789)."""
    return _mean_of_least(document.view.logp)


@membership_attack("min_k_plus_plus", "min-k++", "min-k on log-probabilities standardized by the prediction")
def min_k_plus_plus(document: ScoredDocument) -> float:
    """Min-k on log-probabilities standardized by the prediction (Zhang et al. 2024, arXiv 2404.02936)."""
    view = document.view
    return _mean_of_least((view.logp + view.entropy) / np.maximum(view.deviation, 1e-6))


@membership_attack("reference", "reference", "loss minus that of a reference model", needs_reference=True)
def reference(document: ScoredDocument) -> float:
    """Mean token loss minus that of a reference model, which never saw the members."""
    assert document.reference is not None
    return document.reference.model - document.reference.reference


def _mean_of_least(values: np.ndarray) -> float:
    """Minus the mean of the smallest fifth of some values."""
    count = max(1, round(MIN_K * len(values)))
    return float(-np.sort(values)[:count].mean())
