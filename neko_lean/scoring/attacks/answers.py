"""What attacks share: generating answers under attack, and scoring them as points of a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neko_lean.data import Example, PromptFormat, encode_prompts
from neko_lean.models import CausalLM
from neko_lean.scoring.generation import Generation, GenerationLimits, generate_on_all_ranks
from neko_lean.scoring.limits import TruncationCounts, fit_prompt
from neko_lean.scoring.sampling import sample_key
from neko_lean.scoring.task import SCORE_NAMES, example_score, score_name, unicode_score
from neko_lean.scoring.uncertainty import mean_by_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerGenerator:
    """Generates answers to examples, with a progress bar.

    Attributes:
        tokenizer: the model's tokenizer.
        limits: where batches and generations end.
        truncated: receives the number of truncated prompts of each attack.
        quiet: whether to hide the progress bar.
        prompt_format: the prompt format.
    """

    tokenizer: PreTrainedTokenizerBase
    limits: GenerationLimits
    truncated: TruncationCounts
    quiet: bool
    prompt_format: PromptFormat

    def __call__(
        self, lm: CausalLM, examples: Sequence[Example], label: str, prompts: Sequence[Sequence[int]] | None = None
    ) -> list[Generation]:
        """Generate an answer to each example; the batches are divided among the ranks.

        Args:
            lm: the model.
            examples: the examples to answer.
            label: the progress bar's label, and the key for the number of truncated prompts.
            prompts: token ids to continue instead of the examples' inputs.
        """
        if prompts is None:
            prompts = encode_prompts(examples, self.tokenizer, self.prompt_format)
        self._count_truncated(lm, prompts, label)
        return self._generate(lm, examples, prompts, label)

    def sample(
        self, lm: CausalLM, examples: Sequence[Example], label: str, num_samples: int, seed: int
    ) -> list[list[Generation]]:
        """Sample answers to each example at temperature 1.

        In float32 they depend only on the model, the seed and the example, whatever the size of the batches.

        Args:
            lm: the model.
            examples: the examples to answer.
            label: as for `__call__`.
            num_samples: number of answers to each example.
            seed: random seed.

        Returns:
            The answers to each example.
        """
        prompts = encode_prompts(examples, self.tokenizer, self.prompt_format)
        self._count_truncated(lm, prompts, label)

        # The samples of an example follow each other, so that they share a batch.
        keys = [sample_key(seed, example.id, sample) for example in examples for sample in range(num_samples)]
        repeated_examples = [example for example in examples for _ in range(num_samples)]
        repeated_prompts = [ids for ids in prompts for _ in range(num_samples)]
        sampled = self._generate(lm, repeated_examples, repeated_prompts, label, keys)
        return [sampled[start : start + num_samples] for start in range(0, len(sampled), num_samples)]

    def _generate(
        self,
        lm: CausalLM,
        examples: Sequence[Example],
        prompts: Sequence[Sequence[int]],
        label: str,
        sample_keys: Sequence[str] | None = None,
    ) -> list[Generation]:
        return generate_on_all_ranks(
            lm,
            self.tokenizer,
            examples,
            prompts,
            self.limits,
            end=self.prompt_format.end_of_turn,
            label=label,
            quiet=self.quiet,
            sample_keys=sample_keys,
        )

    def _count_truncated(self, lm: CausalLM, prompts: Sequence[Sequence[int]], label: str) -> None:
        fitted = [fit_prompt(lm, ids, self.limits.max_new_tokens)[0] for ids in prompts]
        count = sum(len(kept_ids) < len(ids) for kept_ids, ids in zip(fitted, prompts, strict=True))
        if count:
            self.truncated.attacks[label] = count


def baseline_point(examples: Sequence[Example], baseline: Mapping[str, Generation]) -> dict[str, Any]:
    """The point before an attack, from the generations by example id."""
    return point(examples, [baseline[example.id] for example in examples])


def point(examples: Sequence[Example], generations: Sequence[Generation]) -> dict[str, Any]:
    """One point of a curve: the means of both scores over their examples, with intervals over documents."""
    results: dict[str, Any] = {}
    for name in SCORE_NAMES:
        of_name = [
            (example, generation.text)
            for example, generation in zip(examples, generations, strict=True)
            if score_name(example) == name
        ]
        scores = [example_score(example, text) for example, text in of_name]
        mean = mean_by_document([example for example, _ in of_name], scores)
        results |= {name: mean["mean"], f"{name}_interval": mean["interval"], f"{name}_rows": len(of_name)}
        unicode_scores = [unicode_score(example, text) for example, text in of_name]
        results[f"unicode_{name}"] = sum(unicode_scores) / len(unicode_scores) if unicode_scores else None
    return results
