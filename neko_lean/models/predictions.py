"""Statistics of a model's next-token predictions, without gradient: what scoring and caching measure of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neko_lean.data import pad
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.lm_head import IDENTITY, LogitTransform, logits, rows_per_chunk


class PredictionStats(NamedTuple):
    """How a model predicts each of N tokens; all [N], in nats where a unit applies."""

    logp: Tensor  # log-probability of the token
    entropy: Tensor  # -E[log p] of the predicted distribution
    logp_std: Tensor  # standard deviation of log p under that distribution
    rank: Tensor  # int64, rank of the token by probability; 1 for the most likely one


@torch.no_grad()
def prediction_stats(
    hidden: Tensor, weight: Tensor, target: Tensor, transform: LogitTransform = IDENTITY
) -> PredictionStats:
    """Compute prediction statistics from hidden states, one chunk of rows at a time.

    Args:
        hidden: [N, d] last hidden states.
        weight: [V, d] weight of the head.
        target: [N] int64, the token that follows each hidden state.
        transform: function from `hidden @ weight.T` to logits.
    """
    chunk = rows_per_chunk(weight.shape[0])
    chunks = []
    for hidden_chunk, target_chunk in zip(hidden.split(chunk), target.split(chunk), strict=True):
        logp = logits(hidden_chunk, weight, transform).log_softmax(1)  # [c, V]
        target_logp = logp.gather(1, target_chunk[:, None])  # [c, 1]
        rank = (logp > target_logp).sum(1) + 1  # [c]

        # torch.where, because 0 * -inf is NaN: a token of probability 0 adds nothing to an expectation.
        p = logp.exp()
        mean = torch.where(p > 0, p * logp, 0).sum(1, keepdim=True)  # [c, 1]
        std = torch.where(p > 0, p * (logp - mean) ** 2, 0).sum(1).sqrt()  # [c]

        chunks.append((target_logp[:, 0], -mean[:, 0], std, rank))
    return PredictionStats(*(torch.cat(column) for column in zip(*chunks, strict=True)))


@torch.no_grad()
def next_token_logp(lm: CausalLM, sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Log-probability of every token except the first of each sequence: [sum of (length - 1)] float32, in nats."""
    hidden, target = _hidden_and_targets(lm, sequences, pad_id)
    target_logp: Tensor = token_stats(hidden, lm.head, target, transform=lm.transform)[0]
    return target_logp


@torch.no_grad()
def next_token_stats(lm: CausalLM, sequences: Sequence[Sequence[int]], pad_id: int) -> list[PredictionStats]:
    """Prediction statistics of every token except the first: one PredictionStats of [length - 1] per sequence."""
    hidden, target = _hidden_and_targets(lm, sequences, pad_id)
    stats = prediction_stats(hidden, lm.head, target, lm.transform)

    lengths = [len(sequence) - 1 for sequence in sequences]
    columns = [column.split(lengths) for column in stats]
    return [PredictionStats(*of_sequence) for of_sequence in zip(*columns, strict=True)]


def _hidden_and_targets(lm: CausalLM, sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Hidden states [n, d] before every token except the first of each sequence, and those tokens [n], padding left
    out."""
    input_ids, mask = pad(sequences, pad_id, lm.device)  # [B, L] each
    is_target = mask[:, 1:].bool()  # [B, L - 1]
    hidden = lm.hidden(input_ids)[:, :-1][is_target]  # [n, d]
    return hidden, input_ids[:, 1:][is_target]
