"""Membership inference: can a document of the forget set still be told from one the model never saw?

Five attacks on one View a document. In each of them a member is expected to have the lower number, as a loss is.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neko_lean.data import TASKS
from neko_lean.models import CausalLM, position_limit
from neko_lean.scoring.limits import MAX_LENGTH
from neko_lean.scoring.views import View, tokenised, view_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Numbers = Sequence[float] | np.ndarray


LEAST = 0.2  # share of a document's tokens that min-k looks at


FALSE_POSITIVES = 0.01


DRAWS = 1000


def document_losses(
    lm: CausalLM, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], *, batch_tokens: int
) -> np.ndarray:
    """Mean token loss of each whole document, in nats: [len(documents)] float64."""
    ids, _ = tokenised(tokenizer, documents, position_limit(lm, MAX_LENGTH))
    views = view_documents(lm, tokenizer, ids, batch_tokens=batch_tokens)
    return np.array([-one.logp.mean() for one in views])


def attack_numbers(text: str, view: View) -> dict[str, float]:
    """A document's number in each attack but `reference`, which is its loss less that of a reference model.

    loss: mean token loss (Yeom et al. 2018, arXiv 1709.01604), which is the shared task's attack. zlib: the whole loss
    over the bytes that the text compresses to (Carlini et al. 2021, arXiv 2012.07805). min_k: mean loss of the fifth of
    its tokens that are least likely (Shi et al. 2024, arXiv 2310.16789). min_k_plus_plus: the same of log-probabilities
    standardised by the distribution they came from (Zhang et al. 2024, arXiv 2404.02936).
    """
    standard = (view.logp + view.entropy) / np.maximum(view.deviation, 1e-6)
    least = max(1, round(LEAST * len(view.logp)))
    found = {
        "loss": -view.logp.mean(),
        "zlib": -view.logp.sum() / len(zlib.compress(text.encode())),
        "min_k": -np.sort(view.logp)[:least].mean(),
        "min_k_plus_plus": -np.sort(standard)[:least].mean(),
    }
    return {name: float(value) for name, value in found.items()}


def auc(members: Numbers, nonmembers: Numbers) -> float:
    """Probability that a member's loss is below a non-member's, ties half: the ROC AUC of -loss, by rank."""
    member, other = np.asarray(members, dtype=np.float64), np.sort(np.asarray(nonmembers, dtype=np.float64))
    above = len(other) - np.searchsorted(other, member, side="right")
    ties = np.searchsorted(other, member, side="right") - np.searchsorted(other, member, side="left")
    return float((above + 0.5 * ties).sum() / (len(member) * len(other)))


def two_sided_auc(members: Numbers, nonmembers: Numbers) -> float:
    """AUC of |loss - median non-member loss|, members expected further off: half of the members remembered and half
    blown up have an AUC of 0.5, and are caught here. Below 0.5 members are the more alike."""
    middle = np.median(np.asarray(nonmembers, dtype=np.float64))
    return auc(-np.abs(np.asarray(members) - middle), -np.abs(np.asarray(nonmembers) - middle))


def tpr(members: Numbers, nonmembers: Numbers, *, low: bool) -> float:
    """Share of the members that are called so at the threshold at which at most 1 % of the non-members are: members
    called by a low number (remembered), or by a high one (blown up)."""
    sign = 1.0 if low else -1.0
    member, other = sign * np.asarray(members), np.sort(sign * np.asarray(nonmembers))
    # The threshold is a non-member's own number; strictly below it are as many non-members as may be called.
    return float((member < other[int(FALSE_POSITIVES * len(other))]).mean())


def bootstrap(statistic: Callable[[Numbers, Numbers], float], members: Numbers, nonmembers: Numbers) -> list[float]:
    """95 % interval: the documents of each side drawn anew, with replacement."""
    rng = np.random.default_rng(0)
    sides = np.asarray(members, dtype=np.float64), np.asarray(nonmembers, dtype=np.float64)
    drawn = [statistic(*(rng.choice(side, len(side)) for side in sides)) for _ in range(DRAWS)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return [float(low), float(high)]


def auc_interval(members: Numbers, nonmembers: Numbers) -> list[float]:
    """95 % bootstrap interval of the AUC."""
    return bootstrap(auc, members, nonmembers)


def membership_score(area: float) -> float:
    """1 - 2 |AUC - 0.5|: 1 when members and non-members cannot be told apart."""
    return 1 - 2 * abs(area - 0.5)


def perfect_range(members: int, nonmembers: int, draws: int = 4000) -> tuple[float, float]:
    """Mean and 5th percentile of the membership score of a perfect model with so many documents, by simulation."""
    rng = np.random.default_rng(0)
    scores = [membership_score(auc(rng.random(members), rng.random(nonmembers))) for _ in range(draws)]
    return float(np.mean(scores)), float(np.percentile(scores, 5))


def roc(members: Numbers, nonmembers: Numbers) -> dict[str, list[float]]:
    """The ROC curve, members called by a low number: false and true positive rates from (0, 0) to (1, 1)."""
    member, other = np.sort(members), np.sort(nonmembers)
    at = np.unique(np.concatenate([member, other]))
    return {
        name: [0.0, *(np.searchsorted(side, at, side="right") / len(side)).tolist()]
        for name, side in (("fpr", other), ("tpr", member))
    }


def attack_table(members: Sequence[Mapping[str, Any]], nonmembers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each attack that every document has a number for: signed AUC, two-sided AUC, and true positive rate at 1 % false
    positives in both tails, with 95 % intervals of the AUCs. Documents are `attack_numbers`."""
    every = [*members, *nonmembers]
    table = {}
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference"):
        if all(name in one for one in every):
            sides = [one[name] for one in members], [one[name] for one in nonmembers]
            table[name] = {
                "auc": auc(*sides),
                "auc_interval": auc_interval(*sides),
                "two_sided_auc": two_sided_auc(*sides),
                "two_sided_auc_interval": bootstrap(two_sided_auc, *sides),
                "tpr_members_low": tpr(*sides, low=True),
                "tpr_members_high": tpr(*sides, low=False),
            }
    return table


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What scores.json says of membership, from the lines of documents.jsonl: `side`, `task`, and `attack_numbers`."""
    sides = {side: [one for one in lines if one["side"] == side] for side in ("member", "nonmember")}
    attacks = {"all": attack_table(*sides.values())}
    for task in TASKS:
        some = [[one for one in side if one["task"] == task] for side in sides.values()]
        if all(some):
            attacks[task] = attack_table(*some)
    member, other = ([one["loss"] for one in some] for some in sides.values())
    loss = attacks["all"]["loss"]
    mean, low = perfect_range(len(member), len(other))
    return {
        "auc": loss["auc"],
        "score": membership_score(loss["auc"]),
        "auc_interval": loss["auc_interval"],
        "two_sided_auc": loss["two_sided_auc"],
        "members": len(member),
        "nonmembers": len(other),
        "member_loss": float(np.mean(member)),
        "nonmember_loss": float(np.mean(other)),
        "perfect_score_mean": mean,
        "perfect_score_5th_percentile": low,
        "attacks": attacks,
        "roc": roc(member, other),
    }
