"""The two-model way, as `plan` and the benches compare with it: a student, a live teacher, and torch's own AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Way:
    """How somebody without a teacher cache would train."""

    name: str
    dtype: torch.dtype  # of both models, the gradients and the optimizer's state
    checkpointing: bool
    max_length: int | None  # every row is padded to this; None: to the longest of its batch


LEAN = Way("two bfloat16 models, AdamW, checkpointing", torch.bfloat16, True, None)
PUBLISHED = Way("two float32 models, AdamW, padded to 128", torch.float32, False, 128)
WAYS = (LEAN, PUBLISHED)


def two_model_loss(
    student: Any, teacher: Any, forget: tuple[Tensor, Tensor], retain: tuple[Tensor, Tensor], forget_weight: float
) -> Tensor:
    """Gradient ascent on forget plus KL to a live teacher on retain, from materialised logits, as the paper's code
    computes it (aclanthology.org/2025.semeval-1.64).

    Args:
        student, teacher: transformers' causal language models.
        forget, retain: token ids [B, L] and 0/1 masks [B, L], right-padded.
        forget_weight: of the ascent.
    """
    ids, mask = forget
    logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()  # [B, L - 1, V]
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    ascent = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    del logits
    ids, mask = retain
    with torch.no_grad():
        p = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    q = student(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)  # [B, L, V]
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)  # [B, L]
    return forget_weight * ascent + (kl * mask).sum() / mask.sum()
