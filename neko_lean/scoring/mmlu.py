"""MMLU as Open-Instruct runs it: is the model still good for anything after it forgot?

The protocol is that of Open-Instruct's eval/mmlu/run_eval.py: few-shot prompts of at most 2048 tokens, and of the four
letters the one that is likeliest as the next token. What differs, none of it a score on purpose:

- choices and questions are read as they are written, where pandas would turn "None", "N/A" and numbers into others;
- the four are compared by their logits in float32, not by probabilities in the model's dtype, so that ties are rarer;
- tokens that the tokenizer adds itself (BOS) count towards the 2048, and a model that holds fewer positions sets the
  limit to those;
- a question that is too long even without examples loses its beginning, where the original never ends.
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
from neko_lean.scoring.mmlu_data import LETTERS, SUBJECTS, Subject, prompt
from neko_lean.terminal import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


AWARD_FLOOR = 0.371  # below it the shared task gave no award


MAX_LENGTH = 2048


@dataclass(frozen=True)
class Prompt:
    """A question's prompt as tokens, with so many examples; `cut` when even without any it had to be cut."""

    ids: list[int]
    shots: int
    cut: bool


@dataclass(frozen=True)
class Answered:
    """What a model said to one subject's questions: places of the chosen and the right letters, and examples used.

    `truncated` questions had fewer examples than was asked for, or were cut.
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
    """Ask every test question of `subjects` with `shots` examples before it, and count; see `summary`.

    A subject's examples run once, and its questions in batches of at most `batch_tokens` positions, examples included.
    In float32 the choices are those of running each whole prompt alone. `progress` counts questions.
    """
    if shots < 0:
        raise NekoLeanError(f"{shots} MMLU shots make no sense: ask for 0 or more.")
    for name, subject in subjects.items():
        if len(subject.dev) < shots:
            raise NekoLeanError(
                f"MMLU subject {name} has {len(subject.dev)} dev questions, fewer than the {shots} shots asked for: "
                f"ask for at most {len(subject.dev)}."
            )
    answered = {
        name: answer(lm, tokenizer, subject, shots=shots, batch_tokens=batch_tokens, progress=progress)
        for name, subject in subjects.items()
    }
    return summary(answered, shots)


def answer(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    subject: Subject,
    *,
    shots: int,
    batch_tokens: int,
    progress: ProgressBar | None = None,
) -> Answered:
    """The model's choice for each test question of one subject."""
    limit = position_limit(lm, min(MAX_LENGTH, stated_positions(lm.model.config) or MAX_LENGTH))
    prompts = encode_prompts(tokenizer, subject, shots, limit)
    letters = ("the letters of MMLU", letter_tokens(tokenizer))
    questions = ((f"question {n} of MMLU subject {subject.name}", one.ids) for n, one in enumerate(prompts, start=1))
    refuse_unknown_ids([letters, *questions], lm)
    found = letter_logits(lm, tokenizer, prompts, batch_tokens=batch_tokens, progress=progress)
    refuse_non_finite_outputs(found, f"MMLU subject {subject.name}")
    return Answered(
        chosen=found.argmax(1).tolist(),
        right=[question.answer for question in subject.test],
        shots=[one.shots for one in prompts],
        truncated=sum(one.shots < shots or one.cut for one in prompts),
    )


def encode_prompts(tokenizer: PreTrainedTokenizerBase, subject: Subject, shots: int, limit: int) -> list[Prompt]:
    """The prompt of each test question, tokenised as a whole, with as many of the first `shots` examples as fit into
    `limit` tokens."""
    found: dict[int, Prompt] = {}
    for used in range(shots, -1, -1):
        pending = [i for i in range(len(subject.test)) if i not in found]
        if not pending:
            break
        texts = [prompt(subject.name, subject.dev[:used], subject.test[i]) for i in pending]
        for index, ids in zip(pending, encode_texts(tokenizer, texts), strict=True):
            if len(ids) <= limit or used == 0:
                found[index] = Prompt(ids[-limit:], used, len(ids) > limit)
    return [found[i] for i in range(len(subject.test))]


def letter_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that stands for each letter after "Answer:", the last one of " A", " B", " C" and " D"."""
    encoded = [tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in LETTERS]
    tokens = [ids[-1] for ids in encoded if ids]
    if len(set(tokens)) < len(LETTERS):
        raise NekoLeanError("this tokenizer does not tell ' A', ' B', ' C' and ' D' apart: MMLU cannot be measured.")
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
    # transformers is loaded only where a model is.
    from neko_lean.scoring.prefix import last_hidden

    tokens = torch.tensor(letter_tokens(tokenizer), device=lm.device)
    letters, transform = lm.head[tokens], lm.transform.for_tokens(tokens)  # [4, d]
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, one in enumerate(prompts):  # what is alike in two prompts ends early if their examples differ
        groups.setdefault((one.shots, one.cut), []).append(index)
    out = torch.empty(len(prompts), len(LETTERS))
    for group in groups.values():
        rows = [prompts[i].ids for i in group]
        hidden = last_hidden(lm, rows, int(tokenizer.pad_token_id), batch_tokens=batch_tokens, progress=progress)
        out[group] = logits(hidden, letters, transform).float().cpu()
    return out


def summary(answered: Mapping[str, Answered], shots: int) -> dict[str, Any]:
    """The numbers, from what was answered; all shares are 0 to 1.

    `micro` is the mean over questions, `macro` that over subjects, `subjects_found` how many of MMLU's 57 there were,
    `letters` the share of the model's answers that each letter has, `floors` the accuracy of always answering it.
    """
    chosen = [place for one in answered.values() for place in one.chosen]
    right = [place for one in answered.values() for place in one.right]
    subjects = {
        name: {"accuracy": _agreement(one.chosen, one.right), "questions": len(one.right), "shots": min(one.shots)}
        for name, one in answered.items()
    }
    return {
        "micro": _agreement(chosen, right),
        "macro": sum(one["accuracy"] for one in subjects.values()) / len(subjects),
        "shots": shots,
        "questions": len(right),
        "subjects_found": len(SUBJECTS & set(subjects)),
        "subjects": subjects,
        "letters": {letter: chosen.count(place) / len(chosen) for place, letter in enumerate(LETTERS)},
        "floors": {letter: right.count(place) / len(right) for place, letter in enumerate(LETTERS)},
        "award_floor": AWARD_FLOOR,
        "truncated": sum(one.truncated for one in answered.values()),
    }


def _agreement(chosen: list[int], right: list[int]) -> float:
    return sum(one == other for one, other in zip(chosen, right, strict=True)) / len(right)
