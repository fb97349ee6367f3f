"""The sampling attack: what greedy decoding hides may be likely enough to come up in a few samples.

Reisizadeh et al. 2025 (arXiv 2511.04934) found this for most unlearning methods, and named the measure leak@k.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from neko_lean.data import Example
from neko_lean.scoring.attacks.registry import AttackTarget, Curve, attack
from neko_lean.scoring.judge import MAX_TEXT_LEFT
from neko_lean.scoring.task import SCORE_NAMES, score_name, unicode_score
from neko_lean.scoring.uncertainty import mean_by_document

NUM_SAMPLES = 16
SAMPLES = (1, 2, 4, 8, NUM_SAMPLES)  # the values of k in leak@k


@attack("sample", title="Sampling", x_key="samples", x_label="samples (0: greedy)", leaks=True, options=("seed",))
def sample(target: AttackTarget) -> Curve:
    """Sample NUM_SAMPLES answers to each example at temperature 1, and compute the share of examples that leak.

    leak@k is the share of examples of which at least one of k samples leaks, estimated without bias from all samples.
    """
    seed = target.settings.seed or 0
    sampled = target.generate.sample(target.model, target.examples, "samples", NUM_SAMPLES, seed)
    greedy = [float(is_leaked(example, target.baseline[example.id].text)) for example in target.examples]
    counts = [
        sum(is_leaked(example, generation.text) for generation in generations)
        for example, generations in zip(target.examples, sampled, strict=True)
    ]

    curve = [{"samples": 0, "seed": seed, **_leaks(target.examples, greedy)}]
    for k in SAMPLES:
        leaked = [leak_probability(NUM_SAMPLES, count, k) for count in counts]
        curve.append({"samples": k, "seed": seed, **_leaks(target.examples, leaked)})
    return curve


def is_leaked(example: Example, text: str) -> bool:
    """Whether a generation gives the example's answer, in any script.

    An answer that is scored by exact match must be given exactly. Any other leaks if its ROUGE-L recall is above the
    limit up to which the verdict calls a text forgotten.
    """
    score = unicode_score(example, text)
    return score == 1.0 if score_name(example) == "knowledge" else score > MAX_TEXT_LEFT


def leak_probability(num_samples: int, num_leaked: int, k: int) -> float:
    """Probability that at least one of k samples leaks, if `num_leaked` of `num_samples` did.

    The unbiased estimate 1 - C(n - c, k) / C(n, k), as for pass@k (Chen et al. 2021, arXiv 2107.03374).
    """
    return 1 - comb(num_samples - num_leaked, k) / comb(num_samples, k)


def _leaks(examples: Sequence[Example], leaked: Sequence[float]) -> dict[str, Any]:
    """The means over all examples, over those of each score and those of each cell, with intervals over documents.

    Args:
        examples: the examples.
        leaked: for each example the probability that it leaks, 0 or 1 for a single generation.
    """

    def mean(chosen: Sequence[int]) -> dict[str, Any]:
        return mean_by_document([examples[index] for index in chosen], [leaked[index] for index in chosen])

    names = [score_name(example) for example in examples]
    by_key: dict[str, list[int]] = {"leak": list(range(len(examples)))}
    for wanted in SCORE_NAMES:
        by_key[f"{wanted}_leak"] = [index for index, name in enumerate(names) if name == wanted]
    by_cell: dict[str, list[int]] = {}
    for index, (example, name) in enumerate(zip(examples, names, strict=True)):
        by_cell.setdefault(f"forget.{example.task}.{name}", []).append(index)

    results: dict[str, Any] = {}
    for key, chosen in by_key.items():
        of_key = mean(chosen)
        results |= {key: of_key["mean"], f"{key}_interval": of_key["interval"], f"{key}_rows": len(chosen)}
    results["cells"] = {}
    for cell, chosen in by_cell.items():
        of_cell = mean(chosen)
        results["cells"][cell] = {"value": of_cell["mean"], "interval": of_cell["interval"], "rows": len(chosen)}
    return results
