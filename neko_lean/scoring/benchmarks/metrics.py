"""The benchmarks' metrics as pure functions of log-probabilities, texts and scores.

They follow the definitions of OpenUnlearning (arXiv 2506.12618), so that results can be compared with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neko_lean.scoring.membership import auc
from neko_lean.scoring.memorisation import answer_probability
from neko_lean.scoring.task import rouge

EPSILON = 1e-10  # OpenUnlearning adds it to denominators
MIN_K = 0.4  # share of the tokens that the benchmarks' min-k attack looks at
CHANCE_AUC = 0.5  # AUC of a retain-only model if it has not been measured


def rouge_recall(reference: str, generation: str) -> float:
    """ROUGE-L recall with stemming, 0 to 1: TOFU's ROUGE."""
    return float(rouge(reference, generation).recall)


def rouge_f1(reference: str, generation: str) -> float:
    """ROUGE-L F1 with stemming, 0 to 1: MUSE's ROUGE."""
    return float(rouge(reference, generation).fmeasure)


def normalised_probability(correct: np.ndarray, wrong: Sequence[np.ndarray]) -> float:
    """Probability of the correct answer among all answers (TOFU, arXiv 2401.06121, section 2.2.2).

    Args:
        correct: log-probability of each token of the correct answer: [N].
        wrong: the same for each wrong answer; they may have different lengths.
    """
    probability = answer_probability(correct)
    return probability / (probability + sum(map(answer_probability, wrong)) + EPSILON)


def benchmark_truth_ratio(correct: np.ndarray, wrong: Sequence[np.ndarray]) -> float:
    """Truth ratio with the geometric mean over the wrong answers, as TOFU's code and OpenUnlearning compute it.

    `memorisation.truth_ratio` has the arithmetic mean instead, as equation 1 of the paper (arXiv 2401.06121).

    Args:
        correct: log-probability of each token of the correct answer, or of its paraphrase: [N].
        wrong: the same for each wrong answer; they may have different lengths.
    """
    mean_wrong = float(np.exp(np.mean([logp.mean() for logp in wrong])))
    return mean_wrong / (answer_probability(correct) + EPSILON)


def true_better(truth_ratios: Sequence[float]) -> float:
    """Truth ratio of a set that the model should know: mean of max(0, 1 - R); 1 is best."""
    return float(np.maximum(0, 1 - np.asarray(truth_ratios)).mean())


def closer_to_one(truth_ratios: Sequence[float]) -> float:
    """Truth ratio of a forget set: mean of min(R, 1/R); 1 means that true and false answers are equally likely."""
    ratios = np.asarray(truth_ratios)
    return float(np.minimum(ratios, 1 / (ratios + EPSILON)).mean())


def min_k_score(logp: np.ndarray) -> float:
    """Mean loss of the 40 % least likely tokens, in nats (Shi et al. 2024, arXiv 2310.16789); lower for members.

    Args:
        logp: log-probability of each token: [N], N >= 1.
    """
    count = max(1, int(MIN_K * len(logp)))
    return float(-np.sort(logp)[:count].mean())


def min_k_auc(forget: Sequence[np.ndarray], holdout: Sequence[np.ndarray]) -> float:
    """AUC of the min-k attack: 1 if every forget text is better known than every holdout text, 0.5 by chance.

    Args:
        forget: log-probability of each token of each forget text.
        holdout: the same for texts that no model was trained on.
    """
    return auc([min_k_score(logp) for logp in forget], [min_k_score(logp) for logp in holdout])


def privleak(area: float, retain_area: float) -> float:
    """Privacy leakage in percent (MUSE, arXiv 2407.06460, section 3.1); 0 is best.

    It is negative if the forget set is still better known than under the retain-only model (under-unlearning), and
    positive if its loss is suspiciously high (over-unlearning).

    Args:
        area: `min_k_auc` of the unlearned model.
        retain_area: `min_k_auc` of a retain-only model.
    """
    reference = 1 - retain_area
    return ((1 - area) - reference) / (reference + EPSILON) * 100
