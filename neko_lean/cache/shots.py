"""Shots: examples of the retain set that a teacher reads before a question.

A model from before fine-tuning knows neither the facts that the fine-tuned one learned nor the form of its answers:
asked for a phone number, it writes a paragraph. After a few similar examples it answers in their form, and still does
not know the facts, as a model that never saw the forget set would (in-context learning, arXiv 2005.14165).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from neko_lean.data import EncodedExample, PromptIndex, continuation_ids
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
    index = PromptIndex(questions)

    results = []
    for example in examples:
        shots: list[int] = []
        for number in index.nearest(example, count) if example.example.kind == "qa" else ():
            if len(texts[number]) + len(shots) + len(example) > max_positions:
                break
            shots = texts[number] + shots
        results.append(replace(example, shots=tuple(shots)))
    return results
