"""MMLU with Open-Instruct's protocol, to measure whether the model is still useful after unlearning.

As in Open-Instruct's eval/mmlu/run_eval.py, prompts are few-shot with at most 2048 tokens, and the answer is the most
likely next token among the four letters. The differences are in details:

- questions and choices are read literally, whereas pandas would change texts such as "None", "N/A" and numbers;
- the letters are compared by float32 logits instead of probabilities in the model's dtype, so ties are rarer;
- tokens that the tokenizer adds (BOS) count towards the 2048, and a model with fewer positions lowers that limit;
- a question that is too long even without examples is truncated at its beginning; the original never terminates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neko_lean.data import encode_texts
from neko_lean.errors import NekoLeanError
from neko_lean.models import (
    CausalLM,
    logits,
    position_limit,
    refuse_non_finite_outputs,
    refuse_unknown_ids,
    stated_positions,
)
from neko_lean.scoring.mmlu_data import LETTERS, SUBJECTS, Subject, prompt_text
from neko_lean.terminal import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


AWARD_FLOOR = 0.371  # submissions below it received no award in the shared task
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt.

    Attributes:
        ids: its tokens.
        shots: number of examples before the question.
        cut: whether it was truncated because it was too long even without examples.
    """

    ids: list[int]
    shots: int
    cut: bool


@dataclass(frozen=True)
class Answered:
    """A model's answers to the questions of one subject.

    Attributes:
        chosen: index of the chosen letter, by question.
        right: index of the correct letter, by question.
        shots: number of examples before each question.
        truncated: number of questions with fewer examples than requested, or whose prompt was truncated.
    """

    chosen: list[int]
    right: list[int]
    shots: list[int]
    truncated: int


def mmlu(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Mapping[str, Subject],
    *,
    shots: int = 5,
    batch_tokens: int,
    progress: ProgressBar | None = None,
) -> dict[str, Any]:
    """Answer every test question and compute the accuracies.

    A subject's examples run once. In float32 the choices are those of running each whole prompt alone.

    Args:
        lm: the model.
        tokenizer: its tokenizer.
        subjects: the subjects by name.
        shots: number of examples before each question.
        batch_tokens: maximum number of positions per batch, examples included.
        progress: counts questions.

    Returns:
        The `mmlu` block of scores.json; see `summary`.

    Raises:
        NekoLeanError: `shots` is negative or larger than a subject's number of examples, the tokenizer cannot tell the
            letters apart, or an output of the model is NaN or infinite.
    """
    if shots < 0:
        raise NekoLeanError(f"--shots must be 0 or more, got {shots}.")
    for name, subject in subjects.items():
        if len(subject.dev) < shots:
            raise NekoLeanError(
                f"MMLU subject {name} has {len(subject.dev)} dev questions, fewer than the {shots} shots requested; "
                f"use --shots {len(subject.dev)} or fewer."
            )
    answered = {
        name: answer_questions(lm, tokenizer, subject, shots=shots, batch_tokens=batch_tokens, progress=progress)
        for name, subject in subjects.items()
    }
    return summary(answered, shots)


def answer_questions(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    subject: Subject,
    *,
    shots: int,
    batch_tokens: int,
    progress: ProgressBar | None = None,
) -> Answered:
    """Answer the test questions of one subject."""
    limit = position_limit(lm, min(MAX_LENGTH, stated_positions(lm.model.config) or MAX_LENGTH))
    prompts = encode_prompts(tokenizer, subject, shots, limit)
    letters = ("the letters of MMLU", letter_tokens(tokenizer))
    questions = (
        (f"question {number} of MMLU subject {subject.name}", prompt.ids)
        for number, prompt in enumerate(prompts, start=1)
    )
    refuse_unknown_ids([letters, *questions], lm)
    letter_scores = letter_logits(lm, tokenizer, prompts, batch_tokens=batch_tokens, progress=progress)  # [N, 4]
    refuse_non_finite_outputs(letter_scores, f"MMLU subject {subject.name}")
    return Answered(
        chosen=letter_scores.argmax(1).tolist(),
        right=[question.answer for question in subject.test],
        shots=[prompt.shots for prompt in prompts],
        truncated=sum(prompt.shots < shots or prompt.cut for prompt in prompts),
    )


def encode_prompts(tokenizer: PreTrainedTokenizerBase, subject: Subject, shots: int, limit: int) -> list[Prompt]:
    """Tokenize the prompt of each test question, with as many of the first `shots` examples as fit `limit` tokens."""
    prompts: dict[int, Prompt] = {}
    for num_examples in range(shots, -1, -1):
        pending = [i for i in range(len(subject.test)) if i not in prompts]
        if not pending:
            break
        texts = [prompt_text(subject.name, subject.dev[:num_examples], subject.test[i]) for i in pending]
        for index, ids in zip(pending, encode_texts(tokenizer, texts), strict=True):
            if len(ids) <= limit or num_examples == 0:
                prompts[index] = Prompt(ids[-limit:], num_examples, len(ids) > limit)
    return [prompts[i] for i in range(len(subject.test))]


def letter_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of each letter after "Answer:", which is the last token of " A", " B", " C" and " D"."""
    encoded = [tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in LETTERS]
    tokens = [ids[-1] for ids in encoded if ids]
    if len(set(tokens)) < len(LETTERS):
        raise NekoLeanError(
            "this tokenizer does not tell ' A', ' B', ' C' and ' D' apart: MMLU cannot be measured, leave out --mmlu."
        )
    return tokens


@torch.no_grad()
def letter_logits(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    batch_tokens: int,
    progress: ProgressBar | None = None,
) -> Tensor:
    """The four letters' logits after each prompt of one subject: [len(prompts), 4] float32 on the CPU."""
    # Imported here, so that transformers is loaded only once a model is.
    from neko_lean.scoring.shared_prefix import last_hidden

    tokens = torch.tensor(letter_tokens(tokenizer), device=lm.device)
    letters, transform = lm.head[tokens], lm.transform.for_tokens(tokens)  # [4, d]
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, prompt in enumerate(prompts):  # prompts with different examples share only a short prefix
        groups.setdefault((prompt.shots, prompt.cut), []).append(index)

    out = torch.empty(len(prompts), len(LETTERS))  # [N, 4]
    for group in groups.values():
        rows = [prompts[i].ids for i in group]
        hidden = last_hidden(lm, rows, int(tokenizer.pad_token_id), batch_tokens=batch_tokens, progress=progress)
        out[group] = logits(hidden, letters, transform).float().cpu()
    return out


def summary(answered: Mapping[str, Answered], shots: int) -> dict[str, Any]:
    """The `mmlu` block of scores.json; shares are 0 to 1.

    `micro` is the mean over questions and `macro` that over subjects; `subjects_found` counts the subjects among MMLU's
    57; `letters` is the share of answers with each letter, and `floors` the accuracy of always choosing it.
    """
    chosen = [letter for answers in answered.values() for letter in answers.chosen]
    right = [letter for answers in answered.values() for letter in answers.right]
    subjects = {
        name: {
            "accuracy": _accuracy(answers.chosen, answers.right),
            "questions": len(answers.right),
            "shots": min(answers.shots),
        }
        for name, answers in answered.items()
    }
    return {
        "micro": _accuracy(chosen, right),
        "macro": sum(subject["accuracy"] for subject in subjects.values()) / len(subjects),
        "shots": shots,
        "questions": len(right),
        "subjects_found": len(SUBJECTS & set(subjects)),
        "subjects": subjects,
        "letters": {letter: chosen.count(index) / len(chosen) for index, letter in enumerate(LETTERS)},
        "floors": {letter: right.count(index) / len(right) for index, letter in enumerate(LETTERS)},
        "award_floor": AWARD_FLOOR,
        "truncated": sum(answers.truncated for answers in answered.values()),
    }


def _accuracy(chosen: list[int], right: list[int]) -> float:
    return sum(letter == correct for letter, correct in zip(chosen, right, strict=True)) / len(right)
