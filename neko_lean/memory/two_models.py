"""The two-model way, as `plan` and the benches compare with it: a student, a live teacher, and torch's own AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neko_lean.models import (
    checkpoint_activations,
)

if TYPE_CHECKING:
    pass
import torch.nn.functional as F

from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.memory.prediction import Need, _bytes, _silent_fake_tensors, fake_model


def predict_two_models(config: Path, baseline: TwoModelBaseline, rows: int, length: int) -> Need:
    """What one step of the two-model way needs, with `rows` rows of `length` tokens of each set; on a GPU."""
    shape = (rows, baseline.max_length or length)
    with FakeTensorMode(), _silent_fake_tensors():
        lm = fake_model(config, baseline.dtype)
        teacher = fake_model(config, baseline.dtype)
        if baseline.checkpointing:
            checkpoint_activations(lm.model)
        ids = torch.zeros(shape, dtype=torch.int64)
        with LiveTensors() as live:
            two_model_loss(lm.model, teacher.model, (ids, ids), (ids, ids), 0.2).backward()
    weights = _bytes(lm.model.parameters())
    # After backward all gradients are there, and AdamW's foreach form takes as much again for its denominators.
    moving = max(live.peak, 2 * weights)
    lines = {
        "student weights": weights,
        "teacher weights": weights,
        "Adam state": 2 * weights,
        "gradients, all": weights,
        "peak of all but weights and state": moving,
    }
    return Need(lines, 4 * weights + moving, 0)


@dataclass(frozen=True)
class TwoModelBaseline:
    """How somebody without a teacher cache would train."""

    name: str
    dtype: torch.dtype  # of both models, the gradients and the optimizer's state
    checkpointing: bool
    max_length: int | None  # every row is padded to this; None: to the longest of its batch


LEAN_BASELINE = TwoModelBaseline("two bfloat16 models, AdamW, checkpointing", torch.bfloat16, True, None)


PUBLISHED_BASELINE = TwoModelBaseline("two float32 models, AdamW, padded to 128", torch.float32, False, 128)


TWO_MODEL_BASELINES = (LEAN_BASELINE, PUBLISHED_BASELINE)


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
