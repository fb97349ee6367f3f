"""What a run looks at every so many steps to choose its checkpoint: is the forget set gone, is the rest still there?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from neko_lean.data import EncodedExample, pad
from neko_lean.models import CHUNK_ELEMENTS, CausalLM
from neko_lean.training.micro_batches import micro_batches


@torch.no_grad()
def answers(
    student: CausalLM, rows: Sequence[EncodedExample], pad_id: int, max_tokens: int = 2**20
) -> dict[str, float]:
    """Over the answers of some rows, the prompt and the true answer so far given (teacher-forced):

    `exact`, the share of rows of whose answer every token is the likeliest one; `nll`, nats a token. Rows whose answer
    was cut off are left out; without any row both are absent. At most `max_tokens` positions go through the model at
    once.
    """
    rows = [one for one in rows if one.answer_length]
    if not rows:
        return {}
    right, nll, tokens = 0, 0.0, 0
    for group in micro_batches([len(one) for one in rows], max_tokens):
        some = [rows[i] for i in group]
        found = _answers(student, some, pad_id)
        right, nll, tokens = right + found[0], nll + found[1], tokens + found[2]
    return {"exact": right / len(rows), "nll": nll / tokens}


def _answers(student: CausalLM, rows: Sequence[EncodedExample], pad_id: int) -> tuple[int, float, int]:
    """Rows answered exactly, the sum of the nats, and the tokens that it is over."""
    ids, _ = pad([one.input_ids for one in rows], pad_id, student.device)
    place = [(n, i - 1) for n, one in enumerate(rows) for i in range(max(1, one.prompt_length), len(one))]
    row, position = torch.tensor(place, device=student.device).T
    hidden, target = student.hidden(ids)[row, position], ids[row, position + 1]  # [N, d], [N]
    right, nll = [], 0.0
    chunk = max(1, CHUNK_ELEMENTS // len(student.head))
    for some, wanted in zip(hidden.split(chunk), target.split(chunk), strict=True):
        z = student.logits(some)  # [c, V]
        right.append(z.argmax(1) == wanted)
        nll -= (z.gather(1, wanted[:, None]).squeeze(1) - z.logsumexp(1)).double().sum().item()
    wrong = torch.zeros(len(rows), device=student.device).index_add(0, row, (~torch.cat(right)).float())
    return int((wrong == 0).sum()), nll, len(target)


def quality(values: Mapping[str, float]) -> float:
    """One number for a checkpoint, 0 to 1: the harmonic mean of 1 - forget exact match, retain exact match, and
    exp(-retain KL), as an evaluation's `eval_...` values name them. Those that a run does not have are left out."""
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
