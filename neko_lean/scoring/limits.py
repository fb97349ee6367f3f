"""Length and batch limits, which bound memory whatever the length and number of the examples.

A truncated prompt keeps its last tokens, because those are what the model continues. A truncated answer or document
keeps its first tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from neko_lean.data import EncodedExample
from neko_lean.models import CausalLM, position_limit

MAX_LENGTH = 2048  # tokens of a prompt, of a document, and of an example's prompt and answer together
BATCH_TOKENS = 8192  # positions of a forward pass over documents, padding included
GENERATED_TOKENS = 65536  # positions of a generation batch, new tokens and padding included
MIN_NEW_TOKENS = 32  # new tokens that a prompt leaves room for: if the model has fewer positions, the prompt is cut


@dataclass
class TruncationCounts:
    """Numbers of examples and documents that were truncated; written to scores.json under the key `cut`.

    Attributes:
        prompts: examples whose prompt lost its beginning before generation.
        new_tokens: examples that were allowed fewer new tokens than `max_new_tokens`.
        answers: examples of which prompt and answer could not be measured in full.
        empty_answers: examples whose answer has no tokens, so nothing was measured for them.
        paraphrases: answers of `--paraphrases` that were truncated or have no tokens.
        documents: documents of `--mia` that lost their end.
        held: documents of `--held` that lost their end.
        attacks: number of prompts that lost their beginning, by attack.
    """

    prompts: int = 0
    new_tokens: int = 0
    answers: int = 0
    empty_answers: int = 0
    paraphrases: int = 0
    documents: int = 0
    held: int = 0
    attacks: dict[str, int] = field(default_factory=dict)


def fit_prompt(lm: CausalLM, prompt: Sequence[int], max_new_tokens: int) -> tuple[Sequence[int], int]:
    """Truncate a prompt so that it and its new tokens fit the model.

    The prompt keeps at most its last MAX_LENGTH tokens. If the model has too few positions, the prompt is cut until
    MIN_NEW_TOKENS new tokens fit, or half of the positions if the model has very few.

    Returns:
        The truncated prompt, and the number of new tokens that fit after it.
    """
    limit = position_limit(lm, min(len(prompt), MAX_LENGTH) + max_new_tokens)
    reserved = min(max_new_tokens, MIN_NEW_TOKENS, max(1, limit // 2))
    fitted = prompt[-min(MAX_LENGTH, max(1, limit - reserved)) :]
    return fitted, min(max_new_tokens, limit - len(fitted))


def fit_answer(example: EncodedExample, limit: int) -> EncodedExample:
    """Truncate an encoded example to `limit` tokens, keeping part of its answer.

    The prompt keeps as many of its last tokens as leave room for MIN_NEW_TOKENS tokens of the answer, or for half of a
    small limit. The answer keeps its first tokens.
    """
    reserved = min(example.answer_length, MIN_NEW_TOKENS, max(1, limit // 2))
    prompt = example.input_ids[: example.prompt_length][-max(1, limit - reserved) :]
    input_ids = [*prompt, *example.input_ids[example.prompt_length :]][:limit]
    return replace(
        example,
        input_ids=input_ids,
        prompt_length=min(len(prompt), limit),
        num_truncated=example.num_truncated + len(example) - len(input_ids),
    )


def generation_batches(
    lengths: Sequence[int], shapes: Sequence[tuple[int, int]], order: Iterable[int], max_rows: int
) -> list[list[int]]:
    """Group prompts of similar length into batches, shortest first.

    Args:
        lengths: number of tokens of each prompt before truncation.
        shapes: for each prompt, its number of tokens after truncation and its number of new tokens.
        order: indices of the prompts to batch.
        max_rows: maximum number of prompts per batch.

    Returns:
        Batches of indices, each with at most `max_rows` prompts and GENERATED_TOKENS positions.
    """
    batches: list[list[int]] = []
    for index in sorted(order, key=lambda i: lengths[i]):
        batch = [*batches[-1], index] if batches else [index]
        positions = len(batch) * (max(shapes[i][0] for i in batch) + max(shapes[i][1] for i in batch))
        if len(batch) == 1 or len(batch) > max_rows or positions > GENERATED_TOKENS:
            batches.append([index])
        else:
            batches[-1].append(index)
    return batches
