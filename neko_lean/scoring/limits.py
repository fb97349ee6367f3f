"""How long texts are cut, and what a batch may hold: memory depends on neither a row's length nor the number of rows.

A prompt keeps its last tokens, since they are what a model continues. An answer and a document keep their first tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from neko_lean.data import EncodedExample
from neko_lean.models import CausalLM, position_limit

MAX_LENGTH = 2048  # tokens of a prompt, of a document, and of a row's prompt and answer together


BATCH_TOKENS = 8192  # positions of a forward pass over documents, padding included


GENERATED_TOKENS = 65536  # positions of a batch of generations, new tokens and padding included


ROOM = 32  # new tokens that a prompt leaves room for: where a model has fewer positions left, the prompt is cut


@dataclass
class Cut:
    """How much of what was scored lost tokens to the limits; what scores.json says under `cut`.

    Attributes:
        prompts: rows whose prompt lost its beginning, when asked.
        new_tokens: rows that were given fewer new tokens than `max_new_tokens`.
        answers: rows of which not the whole prompt and answer were measured.
        empty_answers: rows whose answer has no tokens, so that nothing was measured of it.
        paraphrases: wordings of `--paraphrases` of which the same holds as of `answers` or `empty_answers`.
        documents: documents of `--mia` that lost their end.
        held: documents of `--held` that lost their end.
        attacks: by attack, prompts that lost their beginning.
    """

    prompts: int = 0
    new_tokens: int = 0
    answers: int = 0
    empty_answers: int = 0
    paraphrases: int = 0
    documents: int = 0
    held: int = 0
    attacks: dict[str, int] = field(default_factory=dict)


def fitted(lm: CausalLM, prompt: Sequence[int], max_new_tokens: int) -> tuple[Sequence[int], int]:
    """A prompt and its number of new tokens, cut to the limits.

    A prompt keeps its last tokens: MAX_LENGTH of them, and where the model has too few positions, so many that ROOM new
    tokens fit, or half of all positions where those are few.
    """
    limit = position_limit(lm, min(len(prompt), MAX_LENGTH) + max_new_tokens)
    room = min(max_new_tokens, ROOM, max(1, limit // 2))
    kept = prompt[-min(MAX_LENGTH, max(1, limit - room)) :]
    return kept, min(max_new_tokens, limit - len(kept))


def fitted_answer(one: EncodedExample, limit: int) -> EncodedExample:
    """An encoded row cut to `limit` tokens, such that some of its answer is left.

    The prompt keeps its last tokens, so many that ROOM tokens of the answer fit, or all where it has fewer, or half of
    the limit where that is small; the answer keeps its first tokens.
    """
    room = min(one.answer_length, ROOM, max(1, limit // 2))
    prompt = one.input_ids[: one.prompt_length][-max(1, limit - room) :]
    ids = [*prompt, *one.input_ids[one.prompt_length :]][:limit]
    return replace(
        one, input_ids=ids, prompt_length=min(len(prompt), limit), num_truncated=one.num_truncated + len(one) - len(ids)
    )


def generation_batches(
    lengths: Sequence[int], shapes: Sequence[tuple[int, int]], order: Iterable[int], max_rows: int
) -> list[list[int]]:
    """Indices of rows in batches of at most `max_rows` rows and GENERATED_TOKENS positions.

    Args:
        lengths: tokens of each prompt before it was cut: rows of like length go together, shortest first.
        shapes: of each prompt, the tokens that are left of it and its number of new tokens.
        order: the rows to batch.
        max_rows: the most rows of a batch.
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
