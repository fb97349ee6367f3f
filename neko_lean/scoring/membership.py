"""Membership inference by loss: can a document of the forget set still be told from one the model never saw?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from neko_lean.data import length_batches
from neko_lean.errors import NekoLeanError
from neko_lean.modeling import CausalLM, next_token_logp
from neko_lean.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 2048


@torch.no_grad()
def document_losses(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    batch_tokens: int,
    progress: Bar | None = None,
) -> np.ndarray:
    """Mean token loss of each whole document, in nats: [len(documents)] float64."""
    lm.model.eval()
    encoded = [tokenizer(text)["input_ids"][:MAX_LENGTH] for text in documents]
    for number, ids in enumerate(encoded):
        if len(ids) < 2:
            raise NekoLeanError(f"document {number + 1} has fewer than two tokens, so it has no loss: {ids}.")
    losses = np.zeros(len(documents))
    for batch in length_batches([len(ids) for ids in encoded], max_rows=len(encoded), max_tokens=batch_tokens):
        logp = next_token_logp(lm, [encoded[i] for i in batch], int(tokenizer.pad_token_id))
        for index, row in zip(batch, logp.split([len(encoded[i]) - 1 for i in batch]), strict=True):
            losses[index] = -row.double().mean().item()
        if progress is not None:
            progress.advance(len(batch))
    return losses


def auc(members: Sequence[float] | np.ndarray, nonmembers: Sequence[float] | np.ndarray) -> float:
    """Probability that a member's loss is below a non-member's, ties half: the ROC AUC of -loss, by rank."""
    member, other = np.asarray(members, dtype=np.float64), np.sort(np.asarray(nonmembers, dtype=np.float64))
    above = len(other) - np.searchsorted(other, member, side="right")
    ties = np.searchsorted(other, member, side="right") - np.searchsorted(other, member, side="left")
    return float((above + 0.5 * ties).sum() / (len(member) * len(other)))


def two_sided_auc(members: Sequence[float] | np.ndarray, nonmembers: Sequence[float] | np.ndarray) -> float:
    """AUC of |loss - median non-member loss|, members expected further off: half of the members remembered and half
    blown up have an AUC of 0.5, and are caught here. Below 0.5 members are the more alike."""
    middle = np.median(np.asarray(nonmembers, dtype=np.float64))
    return auc(-np.abs(np.asarray(members) - middle), -np.abs(np.asarray(nonmembers) - middle))


def auc_interval(
    members: Sequence[float] | np.ndarray, nonmembers: Sequence[float] | np.ndarray, draws: int = 2000
) -> tuple[float, float]:
    """95 % bootstrap interval of the AUC: the documents of each side drawn anew, with replacement."""
    rng = np.random.default_rng(0)
    areas = [auc(rng.choice(members, len(members)), rng.choice(nonmembers, len(nonmembers))) for _ in range(draws)]
    low, high = np.percentile(areas, (2.5, 97.5))
    return float(low), float(high)


def membership_score(area: float) -> float:
    """1 - 2 |AUC - 0.5|: 1 when members and non-members cannot be told apart."""
    return 1 - 2 * abs(area - 0.5)


def perfect_range(members: int, nonmembers: int, draws: int = 4000) -> tuple[float, float]:
    """Mean and 5th percentile of the membership score of a perfect model with so many documents, by simulation."""
    rng = np.random.default_rng(0)
    scores = [membership_score(auc(rng.random(members), rng.random(nonmembers))) for _ in range(draws)]
    return float(np.mean(scores)), float(np.percentile(scores, 5))
