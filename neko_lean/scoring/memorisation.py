"""How much of an answer the model still holds, whether or not it generates it.

Pure functions of the model's view of the true answer, in which each token is predicted from the prompt and the true
tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neko_lean.scoring.views import View

LARGEST_RATIO = 1e15  # upper bound of a ratio of probabilities; those of a broken model can underflow to 0


def extraction_strength(rank: np.ndarray) -> float:
    """Share of an answer that greedy decoding produces when the tokens before it are given.

    This is the longest suffix in which every token is the most likely one (Carlini et al. 2021, arXiv 2012.07805, as in
    OpenUnlearning, arXiv 2506.12618): 1 if the model generates the answer unaided, 0 if the last token is wrong.

    Args:
        rank: rank of each token, 1 for the most likely: [N].
    """
    wrong = np.flatnonzero(rank != 1)
    return 1.0 if len(wrong) == 0 else 1 - (int(wrong[-1]) + 1) / len(rank)


def exact_memorisation(rank: np.ndarray) -> float:
    """Share of an answer's tokens that are the most likely ones (Tirumala et al. 2022, arXiv 2205.10770)."""
    return float((rank == 1).mean())


def answer_probability(logp: np.ndarray) -> float:
    """exp(mean log-probability) of an answer's tokens (TOFU, arXiv 2401.06121)."""
    return float(np.exp(logp.mean()))


def truth_ratio(paraphrase: View, wrong: Sequence[View]) -> float:
    """TOFU's truth ratio (arXiv 2401.06121, section 2.2.2).

    The mean `answer_probability` of the wrong answers over that of a paraphrase of the true one. It is near 1 if the
    model cannot tell them apart.
    """
    right = answer_probability(paraphrase.logp)
    ratio = float(np.mean([answer_probability(view.logp) for view in wrong])) / right if right > 0 else LARGEST_RATIO
    return min(ratio, LARGEST_RATIO)


def answer_numbers(answer: View) -> dict[str, float]:
    """All numbers of this module for one answer.

    `answer_rank` is the worst rank among the answer's tokens; `within_ten` is 1 if all of them are among the ten most
    likely tokens.
    """
    worst_rank = int(answer.rank.max())
    return {
        "extraction_strength": extraction_strength(answer.rank),
        "exact_memorisation": exact_memorisation(answer.rank),
        "answer_probability": answer_probability(answer.logp),
        "answer_rank": float(worst_rank),
        "within_ten": float(worst_rank <= 10),
        "entropy": float(answer.entropy.mean()),
    }
