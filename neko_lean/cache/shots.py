"""Shots: examples of the retain set that a teacher reads before a question.

A model from before fine-tuning knows neither the facts that the fine-tuned one learned nor the form of its answers:
asked for a phone number, it writes a paragraph. After a few similar examples it answers in their form, and still does
not know the facts, as a model that never saw the forget set would (in-context learning, arXiv 2005.14165).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from neko_lean.data import EncodedExample, continuation_ids
from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_shots(
    examples: Sequence[EncodedExample],
    retain: Sequence[EncodedExample],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int,
) -> list[EncodedExample]:
    """Put similar retain examples before each question; the other kinds, which are texts without a question, have none.

    The shots of a question are the `count` questions of the retain set, of the same task if it has any, whose prompts
    have the most tokens in common with its own (Jaccard index), the most similar one last. The least similar are left
    out where the whole would be longer than the model allows.

    Args:
        examples: the examples that the teacher reads.
        retain: the retain set.
        count: examples to put before each question.
        tokenizer: the teacher's.
        max_positions: positions of the teacher.

    Returns the examples in the same order, with `shots` set.

    Raises NekoLeanError if `examples` or `retain` contains no question.
    """
    questions = [example for example in retain if example.example.kind == "qa" and example.input_ids]
    for name, found in (("retain", questions), ("forget", [e for e in examples if e.example.kind == "qa"])):
        if not found:
            raise NekoLeanError(f"--shots has no effect, because the {name} set has no questions; leave it out.")

    # An answer that ends with a special token, as chat templates end it, is set off from what follows; others need a
    # blank line.
    separator = continuation_ids(tokenizer, "\n\n")
    special = set(tokenizer.all_special_ids)
    texts = [[*ids, *(() if ids[-1] in special else separator)] for ids in (q.input_ids for q in questions)]
    index = _PromptIndex(questions)

    results = []
    for example in examples:
        shots: list[int] = []
        for number in index.nearest(example, count) if example.example.kind == "qa" else ():
            if len(texts[number]) + len(shots) + len(example) > max_positions:
                break
            shots = texts[number] + shots
        results.append(replace(example, shots=tuple(shots)))
    return results


class _PromptIndex:
    """Which examples have which tokens in their prompts."""

    def __init__(self, examples: Sequence[EncodedExample]) -> None:
        self.tasks = np.array([example.example.task for example in examples])
        prompts = [_prompt_tokens(example) for example in examples]
        self.sizes = np.array([len(tokens) for tokens in prompts])
        self.holders: dict[int, list[int]] = defaultdict(list)
        for number, tokens in enumerate(prompts):
            for token in tokens:
                self.holders[token].append(number)

    def nearest(self, example: EncodedExample, count: int) -> list[int]:
        """The numbers of the `count` examples with the most similar prompts, the most similar first."""
        tokens = _prompt_tokens(example)
        holders = [self.holders[token] for token in tokens if token in self.holders]
        common = np.zeros(len(self.sizes))
        for numbers in holders:
            common[numbers] += 1
        # At least 1, because the union of two empty prompts is empty.
        similarity = common / np.maximum(self.sizes + len(tokens) - common, 1)

        of_task = self.tasks == example.example.task
        candidates = np.flatnonzero(of_task) if of_task.any() else np.arange(len(self.sizes))
        order = candidates[np.argsort(-similarity[candidates], kind="stable")]
        return [int(number) for number in order[:count]]


def _prompt_tokens(example: EncodedExample) -> set[int]:
    return set(example.input_ids[: example.prompt_length])
