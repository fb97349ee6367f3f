"""Membership inference: can the documents of the forget set still be told from documents the model never saw?

Statistics over the scores of `membership_attacks`, in which members are expected to have the lower score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neko_lean.data import ANCHOR_TASK, TASKS
from neko_lean.models import CausalLM, position_limit
from neko_lean.scoring.limits import MAX_LENGTH
from neko_lean.scoring.membership_attacks import MEMBERSHIP_ATTACKS
from neko_lean.scoring.views import tokenize_documents, view_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Values = Sequence[float] | np.ndarray
MAX_FALSE_POSITIVE_RATE = 0.01
ALL = "all"  # the key of the attacks on all documents; a task of this name has no table
NUM_RESAMPLES = 1000  # of the bootstrap


def document_losses(
    lm: CausalLM, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], *, batch_tokens: int
) -> np.ndarray:
    """Mean token loss of each document, in nats: [len(documents)] float64."""
    ids, _ = tokenize_documents(tokenizer, documents, position_limit(lm, MAX_LENGTH))
    views = view_documents(lm, tokenizer, ids, batch_tokens=batch_tokens)
    return np.array([-view.logp.mean() for view in views])


def auc(members: Values, nonmembers: Values) -> float:
    """Area under the ROC curve: the probability that a member's score is below a non-member's, with ties as half."""
    member, nonmember = np.asarray(members, dtype=np.float64), np.sort(np.asarray(nonmembers, dtype=np.float64))
    right = np.searchsorted(nonmember, member, side="right")
    above = len(nonmember) - right
    ties = right - np.searchsorted(nonmember, member, side="left")
    return float((above + 0.5 * ties).sum() / (len(member) * len(nonmember)))


def two_sided_auc(members: Values, nonmembers: Values) -> float:
    """AUC of the distance from the median non-member score, with members expected to be further away.

    It detects a model for which half of the members have a low loss and half a loss far above unseen text, while the
    AUC is 0.5. A value below 0.5 means that the members are more alike than the non-members. A non-member is compared
    with the median of the others: its own would be too close, which gives 24 unseen members an AUC of 0.53 on average.
    """
    member, nonmember = (np.asarray(side, dtype=np.float64) for side in (members, nonmembers))
    distances = np.abs(nonmember - _medians_of_others(nonmember))
    return auc(-np.abs(member - np.median(nonmember)), -distances)


def _medians_of_others(values: np.ndarray) -> np.ndarray:
    """For each value the median of all others; for a single value itself: [len(values)]."""
    if len(values) < 2:
        return values
    ordered = np.sort(values)
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2  # the middle places among the others
    below, above = (np.where(ranks > place, ordered[place], ordered[place + 1]) for place in (low, high))
    return np.asarray((below + above) / 2)


def tpr(members: Values, nonmembers: Values, *, low: bool) -> float:
    """True positive rate at a false positive rate of at most 1 %.

    Args:
        members: scores of the members.
        nonmembers: scores of the non-members.
        low: call documents with a low score members (remembered text) instead of those with a high score (text whose
            loss is far above unseen text).
    """
    sign = 1.0 if low else -1.0
    member, nonmember = sign * np.asarray(members), np.sort(sign * np.asarray(nonmembers))
    # With a non-member's score as a strict threshold, exactly the allowed number of non-members are below it.
    return float((member < nonmember[int(MAX_FALSE_POSITIVE_RATE * len(nonmember))]).mean())


def bootstrap(statistic: Callable[[Values, Values], float], members: Values, nonmembers: Values) -> list[float]:
    """95 % bootstrap interval of a statistic; members and non-members are resampled separately."""
    rng = np.random.default_rng(0)
    sides = np.asarray(members, dtype=np.float64), np.asarray(nonmembers, dtype=np.float64)
    resampled = [statistic(*(rng.choice(side, len(side)) for side in sides)) for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(resampled, (2.5, 97.5))
    return [float(low), float(high)]


def auc_interval(members: Values, nonmembers: Values) -> list[float]:
    """95 % bootstrap interval of the AUC."""
    return bootstrap(auc, members, nonmembers)


def membership_score(area: float) -> float:
    """1 - 2 |AUC - 0.5|: 1 if members and non-members cannot be told apart, 0 if they can without error."""
    return 1 - 2 * abs(area - 0.5)


def perfect_range(members: int, nonmembers: int, draws: int = 4000) -> tuple[float, float]:
    """Mean and 5th percentile of the membership score of a perfect model, simulated for these numbers of documents."""
    rng = np.random.default_rng(0)
    scores = [membership_score(auc(rng.random(members), rng.random(nonmembers))) for _ in range(draws)]
    return float(np.mean(scores)), float(np.percentile(scores, 5))


def roc(members: Values, nonmembers: Values) -> dict[str, list[float]]:
    """The ROC curve: false and true positive rates from (0, 0) to (1, 1)."""
    member, nonmember = np.sort(members), np.sort(nonmembers)
    thresholds = np.unique(np.concatenate([member, nonmember]))
    return {
        name: [0.0, *(np.searchsorted(side, thresholds, side="right") / len(side)).tolist()]
        for name, side in (("fpr", nonmember), ("tpr", member))
    }


def attack_table(members: Sequence[Mapping[str, Any]], nonmembers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """AUCs and true positive rates of each attack for which every document has a score.

    Args:
        members: `attack_scores` of each member.
        nonmembers: `attack_scores` of each non-member.
    """
    documents = [*members, *nonmembers]
    table = {}
    for name in MEMBERSHIP_ATTACKS:
        if all(name in document for document in documents):
            sides = [document[name] for document in members], [document[name] for document in nonmembers]
            table[name] = {
                "auc": auc(*sides),
                "auc_interval": auc_interval(*sides),
                "two_sided_auc": two_sided_auc(*sides),
                "two_sided_auc_interval": bootstrap(two_sided_auc, *sides),
                "tpr_members_low": tpr(*sides, low=True),
                "tpr_members_high": tpr(*sides, low=False),
            }
    return table


def _tasks(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tasks that documents name, LUME's first, the others in the order of the documents."""
    named = dict.fromkeys(line["task"] for line in documents)
    others = [task for task in named if task and task not in (ANCHOR_TASK, ALL, *TASKS)]
    return [*(task for task in TASKS if task in named), *others]


def summary(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `membership` block of scores.json.

    Args:
        documents: the lines of documents.jsonl, each with `side`, `task`, and the document's `attack_scores`.
    """
    sides = {side: [line for line in documents if line["side"] == side] for side in ("member", "nonmember")}
    attacks = {ALL: attack_table(*sides.values())}
    for task in _tasks(documents):
        of_task = [[line for line in side if line["task"] == task] for side in sides.values()]
        if all(of_task):
            attacks[task] = attack_table(*of_task)

    members, nonmembers = ([line["loss"] for line in side] for side in sides.values())
    loss = attacks[ALL]["loss"]
    mean, low = perfect_range(len(members), len(nonmembers))
    return {
        "auc": loss["auc"],
        "score": membership_score(loss["auc"]),
        "auc_interval": loss["auc_interval"],
        "two_sided_auc": loss["two_sided_auc"],
        "members": len(members),
        "nonmembers": len(nonmembers),
        "member_loss": float(np.mean(members)),
        "nonmember_loss": float(np.mean(nonmembers)),
        "perfect_score_mean": mean,
        "perfect_score_5th_percentile": low,
        "attacks": attacks,
        "roc": roc(members, nonmembers),
    }
