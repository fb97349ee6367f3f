"""How much of an answer is still in the model, whatever it says when asked: read from its views of the true answer.

Pure functions; the answer's tokens are given one after the other, the prompt and the true tokens before it given too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neko_lean.scoring.views import View

LARGEST_RATIO = 1e15  # of probabilities; a broken model's can underflow to 0


def extraction_strength(rank: np.ndarray) -> float:
    """Share of an answer that greedy decoding gives once the rest before it is given (Carlini et al. 2021,
    arXiv 2012.07805, as OpenUnlearning, arXiv 2506.12618, has it): the longest ending of which every token is the
    likeliest. 1 for an answer said unprompted; 0 where the last token is wrong already, at every length."""
    wrong = np.flatnonzero(rank != 1)
    return 1.0 if len(wrong) == 0 else 1 - (int(wrong[-1]) + 1) / len(rank)


def exact_memorisation(rank: np.ndarray) -> float:
    """Share of an answer's tokens that are the likeliest (Tirumala et al. 2022, arXiv 2205.10770)."""
    return float((rank == 1).mean())


def answer_probability(logp: np.ndarray) -> float:
    """exp(mean log-probability) of an answer's tokens (TOFU, arXiv 2401.06121)."""
    return float(np.exp(logp.mean()))


def truth_ratio(paraphrase: View, wrong: Sequence[View]) -> float:
    """TOFU's truth ratio (arXiv 2401.06121, section 2.2.2): mean probability of the wrong answers over that of a
    paraphrase of the true one, each by `answer_probability`. Near 1 where the model cannot tell them apart."""
    right = answer_probability(paraphrase.logp)
    ratio = float(np.mean([answer_probability(one.logp) for one in wrong])) / right if right > 0 else LARGEST_RATIO
    return min(ratio, LARGEST_RATIO)


def answer_numbers(answer: View) -> dict[str, float]:
    """What is kept of one row: the above, `answer_rank`, the worst rank among the answer's tokens, and `within_ten`,
    whether all of them are among the model's first ten guesses."""
    worst = int(answer.rank.max())
    return {
        "extraction_strength": extraction_strength(answer.rank),
        "exact_memorisation": exact_memorisation(answer.rank),
        "answer_probability": answer_probability(answer.logp),
        "answer_rank": float(worst),
        "within_ten": float(worst <= 10),
        "entropy": float(answer.entropy.mean()),
    }
