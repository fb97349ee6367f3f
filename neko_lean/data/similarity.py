"""Find the examples whose prompts are most like a given one's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from neko_lean.data.example_types import EncodedExample


class PromptIndex:
    """Which examples have which tokens in their prompts."""

    def __init__(self, examples: Sequence[EncodedExample]) -> None:
        self.kinds = np.array([example.example.kind for example in examples])
        self.tasks = np.array([example.example.task for example in examples])
        prompts = [_prompt_tokens(example) for example in examples]
        self.sizes = np.array([len(tokens) for tokens in prompts])
        self.holders: dict[int, list[int]] = defaultdict(list)
        for number, tokens in enumerate(prompts):
            for token in tokens:
                self.holders[token].append(number)

    def nearest(self, example: EncodedExample, count: int) -> list[int]:
        """The numbers of the `count` examples whose prompts have the most tokens in common with the example's (Jaccard
        index), the most similar first. They are of its kind and task, as far as any are."""
        tokens = _prompt_tokens(example)
        holders = [self.holders[token] for token in tokens if token in self.holders]
        common = np.zeros(len(self.sizes))
        for numbers in holders:
            common[numbers] += 1
        # At least 1, because the union of two empty prompts is empty.
        similarity = common / np.maximum(self.sizes + len(tokens) - common, 1)

        candidates = np.arange(len(self.sizes))
        for values, own in ((self.kinds, example.example.kind), (self.tasks, example.example.task)):
            alike = candidates[values[candidates] == own]
            candidates = alike if len(alike) else candidates
        order = candidates[np.argsort(-similarity[candidates], kind="stable")]
        return [int(number) for number in order[:count]]


def _prompt_tokens(example: EncodedExample) -> set[int]:
    return set(example.input_ids[: example.prompt_length])
