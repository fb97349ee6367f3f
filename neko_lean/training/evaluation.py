"""Evaluations during training, by which a checkpoint is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from neko_lean.data import EncodedExample, pad
from neko_lean.models import CHUNK_ELEMENTS, CausalLM
from neko_lean.training.micro_batches import micro_batches


@torch.no_grad()
def answer_metrics(
    student: CausalLM, examples: Sequence[EncodedExample], pad_id: int, max_tokens: int = 2**20
) -> dict[str, float]:
    """Teacher-forced metrics of the true answers.

    Args:
        student: the model.
        examples: examples to evaluate; those whose answer was truncated away are left out.
        pad_id: id of the padding token.
        max_tokens: most positions, including padding, that go through the model at once.

    Returns:
        `exact`, the share of examples in whose answer each token is the most likely one, and `nll`, the answers' mean
        negative log-likelihood in nats per token. Empty if no example has an answer.
    """
    examples = [example for example in examples if example.answer_length]
    if not examples:
        return {}

    num_exact, nll, num_tokens = 0, 0.0, 0
    for indices in micro_batches([len(example) for example in examples], max_tokens):
        batch_exact, batch_nll, batch_tokens = _batch_metrics(student, [examples[i] for i in indices], pad_id)
        num_exact += batch_exact
        nll += batch_nll
        num_tokens += batch_tokens
    return {"exact": num_exact / len(examples), "nll": nll / num_tokens}


def _batch_metrics(student: CausalLM, examples: Sequence[EncodedExample], pad_id: int) -> tuple[int, float, int]:
    """Number of exact answers, sum of the negative log-likelihoods in nats, and number of answer tokens."""
    # Hidden states at the positions that predict answer tokens.
    ids, _ = pad([example.input_ids for example in examples], pad_id, student.device)  # [b, l]
    places = [
        (number, position - 1)
        for number, example in enumerate(examples)
        for position in range(max(1, example.prompt_length), len(example))
    ]
    example_index, position = torch.tensor(places, device=student.device).T  # [N] each
    hidden = student.hidden(ids)[example_index, position]  # [N, d]
    targets = ids[example_index, position + 1]  # [N]

    # Logits, in chunks.
    correct, nll = [], 0.0
    chunk = max(1, CHUNK_ELEMENTS // len(student.head))
    for chunk_hidden, chunk_targets in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = student.logits(chunk_hidden)  # [c, V]
        correct.append(logits.argmax(1) == chunk_targets)
        nll -= (logits.gather(1, chunk_targets[:, None]).squeeze(1) - logits.logsumexp(1)).double().sum().item()

    num_wrong = torch.zeros(len(examples), device=student.device)
    num_wrong.index_add_(0, example_index, (~torch.cat(correct)).float())  # [b]
    return int((num_wrong == 0).sum()), nll, len(targets)


def quality(values: Mapping[str, float]) -> float:
    """A score between 0 and 1 for choosing a checkpoint.

    It is the harmonic mean of 1 - forget exact match, retain exact match, and exp(-retain KL).

    Args:
        values: metrics of an evaluation, with the names `eval_forget_exact`, `eval_retain_exact` and `eval_retain_kl`;
            those that a run does not have are left out of the mean.

    Returns NaN if one of them is NaN, and 0 if none is given.
    """
    parts = []
    if "eval_forget_exact" in values:
        parts.append(1 - values["eval_forget_exact"])
    if "eval_retain_exact" in values:
        parts.append(values["eval_retain_exact"])
    if "eval_retain_kl" in values:
        parts.append(math.exp(-values["eval_retain_kl"]))

    if any(math.isnan(part) for part in parts):
        return math.nan  # min() may overlook it
    if not parts or min(parts) <= 0:
        return 0.0
    return len(parts) / sum(1 / part for part in parts)
