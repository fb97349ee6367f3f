"""TOFU: a Task of Fictitious Unlearning (arXiv 2401.06121), with the metrics of OpenUnlearning (arXiv 2506.12618).

The benchmark trains a model on 200 fictitious authors, makes it forget 1, 5 or 10 % of them, and compares it with a
model that was trained on the rest only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neko_lean.data import EncodedExample, Example, encode
from neko_lean.scoring.benchmarks.answers import (
    answer_views,
    generated_answers,
    logp_without_end,
    memorisation_means,
    reference_answers,
)
from neko_lean.scoring.benchmarks.ks_test import ks_p_value
from neko_lean.scoring.benchmarks.metrics import (
    CHANCE_AUC,
    benchmark_truth_ratio,
    closer_to_one,
    min_k_auc,
    normalised_probability,
    privleak,
    rouge_recall,
    true_better,
)
from neko_lean.scoring.benchmarks.tofu_rows import TofuRow, TofuRows
from neko_lean.scoring.generation import GenerationLimits
from neko_lean.scoring.measure import ScoringContext
from neko_lean.scoring.memorisation import answer_probability
from neko_lean.scoring.values import harmonic_mean
from neko_lean.scoring.views import View

MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class AnswerViews:
    """The model's views of the answers to one question.

    Attributes:
        answer: of the true answer.
        correct: of its paraphrase, or of the true answer if there is no paraphrase.
        wrong: of each perturbed answer.
    """

    answer: View
    correct: View
    wrong: list[View]

    @property
    def truth_ratio(self) -> float:
        """The truth ratio of the question."""
        return benchmark_truth_ratio(self.correct.logp, [view.logp for view in self.wrong])

    @property
    def probability(self) -> float:
        """Probability of the true answer."""
        return answer_probability(self.answer.logp)

    @property
    def normalised_probability(self) -> float:
        """Probability of the true answer among true and perturbed answers."""
        return normalised_probability(self.answer.logp, [view.logp for view in self.wrong])


def forget_truth_ratios(context: ScoringContext, rows: TofuRows) -> list[float]:
    """Truth ratio of each row of the forget set: what forget quality needs to know of a retain-only model.

    Args:
        context: the retain-only model.
        rows: the rows of the split.
    """
    encoded = _encode(context, [row.example for row in rows.forget])
    return [views.truth_ratio for views in _answer_views(context, rows.forget, encoded, rows.split)]


def tofu_scores(
    context: ScoringContext,
    rows: TofuRows,
    retain_truth_ratios: Sequence[float] | None = None,
    retain_min_k_auc: float = CHANCE_AUC,
    generations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score a model on one split of TOFU.

    Args:
        context: the model, its prompt format, and the batch size for generation.
        rows: the rows of the split.
        retain_truth_ratios: `forget_truth_ratios` of a retain-only model; without them there is no forget quality.
        retain_min_k_auc: `min_k_auc` of a retain-only model, for privacy leakage.
        generations: texts that were generated with `generation_limits` already, by the example's id.

    Returns:
        The scores, which can be written as JSON:

        - `model_utility`: harmonic mean of the nine numbers in `utility`.
        - `forget_quality`: p-value of the KS test between the truth ratios of this and of a retain-only model, or None.
        - `privleak`: privacy leakage in percent; `min_k_auc` is the AUC it is computed from.
        - `forget`: probability, ROUGE-L recall, truth ratio, extraction strength and exact memorisation.
        - `utility`: probability, ROUGE-L recall and truth ratio of retain set, real authors and world facts.
        - `truth_ratios`: truth ratio of each row of the forget set.

    Raises:
        NekoLeanError: the tokenizer has no EOS token, or an answer has no tokens.
    """
    forget, forget_rouge = _measure(context, rows.forget, rows.split, generations)
    holdout = answer_views(context, _encode(context, rows.holdout), "holdout")
    utility = _utility(context, rows, generations)

    ratios = [views.truth_ratio for views in forget]
    answers = [views.answer for views in forget]
    area = min_k_auc(logp_without_end(answers, "forget"), logp_without_end(holdout, "holdout"))
    return {
        "model_utility": harmonic_mean([value for numbers in utility.values() for value in numbers.values()]),
        "forget_quality": None if retain_truth_ratios is None else ks_p_value(ratios, retain_truth_ratios),
        "privleak": privleak(area, retain_min_k_auc),
        "min_k_auc": area,
        "forget": {
            "probability": _mean([views.probability for views in forget]),
            "rouge": forget_rouge,
            "truth_ratio": closer_to_one(ratios),
            **memorisation_means(answers),
        },
        "utility": utility,
        "truth_ratios": ratios,
    }


def generation_limits(batch_size: int) -> GenerationLimits:
    """Where TOFU's generations end. They do not stop early, because a metric may use all of their words."""
    return GenerationLimits(batch_size, MAX_NEW_TOKENS, stop_early=False)


def _utility(
    context: ScoringContext, rows: TofuRows, generations: Mapping[str, str] | None
) -> dict[str, dict[str, float]]:
    """The nine numbers of model utility, by set.

    Questions about real authors and world facts have short perturbed answers, so their probability is that of the true
    answer among all answers.
    """
    sets = {"retain": rows.retain, "real_authors": rows.real_authors, "world_facts": rows.world_facts}
    numbers = {}
    for name, tofu_rows in sets.items():
        measured, rouge = _measure(context, tofu_rows, name, generations)
        numbers[name] = {
            "probability": _mean(
                [views.probability if name == "retain" else views.normalised_probability for views in measured]
            ),
            "rouge": rouge,
            "truth_ratio": true_better([views.truth_ratio for views in measured]),
        }
    return numbers


def _measure(
    context: ScoringContext, rows: Sequence[TofuRow], label: str, generations: Mapping[str, str] | None
) -> tuple[list[AnswerViews], float]:
    """The views of each row's answers, and the mean ROUGE-L recall of the generated answers."""
    encoded = _encode(context, [row.example for row in rows])
    views = _answer_views(context, rows, encoded, label)

    references = reference_answers(context, encoded)
    answers = generated_answers(context, encoded, generation_limits(context.limits.batch_size), label, generations)
    return views, _mean([rouge_recall(*texts) for texts in zip(references, answers, strict=True)])


def _answer_views(
    context: ScoringContext, rows: Sequence[TofuRow], encoded: Sequence[EncodedExample], label: str
) -> list[AnswerViews]:
    """The views of each row's answers; `encoded` are the rows' questions with their true answers."""
    answers = answer_views(context, encoded, label)

    # All other answers in one call, so that batches are full; then they are distributed to their rows.
    others = [
        replace(row.example, id=f"{row.example.id} answer {number}", output=text)
        for row in rows
        for number, text in enumerate((row.correct, *row.wrong), start=1)
    ]
    remaining = iter(answer_views(context, _encode(context, others), f"{label}, paraphrased and perturbed"))
    return [
        AnswerViews(answer, next(remaining), [next(remaining) for _ in row.wrong])
        for row, answer in zip(rows, answers, strict=True)
    ]


def _encode(context: ScoringContext, examples: Sequence[Example]) -> list[EncodedExample]:
    """Tokenize questions and answers; an answer ends with EOS, or with the end of turn of a chat template."""
    return encode(examples, context.tokenizer, context.prompts, sys.maxsize, append_eos=True)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
