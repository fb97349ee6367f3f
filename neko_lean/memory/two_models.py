"""The usual setup that `plan` and the benchmarks compare with: a student, a live teacher and PyTorch's AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neko_lean.memory.estimate import (
    ADAM_STATE,
    GRADIENTS,
    LINES,
    STUDENT,
    TEACHER,
    UPDATE,
    MemoryEstimate,
    tensor_bytes,
)
from neko_lean.memory.fake_models import FakeModels
from neko_lean.memory.fake_step import repeat_layers_if_possible
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.memory.shortened_models import Shorten, run_shortened

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class TwoModelBaseline:
    """A setup for training without a teacher cache."""

    name: str
    dtype: torch.dtype
    """Dtype of both models, the gradients and the optimizer's state."""
    checkpointing: bool
    """Whether the student's activations are checkpointed."""
    max_length: int | None
    """Length to which every example is padded; None pads to the longest of the batch."""


LEAN_BASELINE = TwoModelBaseline("two bfloat16 models, AdamW, checkpointing", torch.bfloat16, True, None)
PUBLISHED_BASELINE = TwoModelBaseline("two float32 models, AdamW, padded to 128", torch.float32, False, 128)
TWO_MODEL_BASELINES = (LEAN_BASELINE, PUBLISHED_BASELINE)


def predict_two_models(
    config: FakeModels | PreTrainedConfig | Path, baseline: TwoModelBaseline, rows: int, length: int
) -> MemoryEstimate:
    """Memory of one step with two models on a GPU.

    Args:
        config: as for `predict`.
        baseline: the setup.
        rows: number of examples of each of the forget and retain sets.
        length: tokens of each example, unless the baseline pads to a fixed length.
    """
    models = FakeModels.of(config)
    weights, transient = run_shortened(partial(_run_baseline, models, baseline, rows, length))

    # All gradients are alive after backward, and AdamW's foreach form takes as much again for its denominators.
    if sum(transient.values()) < 2 * weights:
        transient = {GRADIENTS: weights, UPDATE: weights}
    lines = {STUDENT: weights, TEACHER: weights, ADAM_STATE: 2 * weights, **transient}
    return MemoryEstimate({name: lines[name] for name in LINES if name in lines}, {}, None)


def _run_baseline(
    models: FakeModels, baseline: TwoModelBaseline, rows: int, length: int, shorten: Shorten
) -> tuple[int, dict[str, int]]:
    """Bytes of one model's weights, and of everything else at the peak of forward and backward pass."""
    with models.use(baseline.dtype) as (lm, recordings):
        weights = tensor_bytes(lm.model.parameters())
        ids = torch.zeros((rows, baseline.max_length or length), dtype=torch.int64)  # [B, L]
        with shorten(lm) as short, LiveTensors(short.counts) as live:
            repeat_layers_if_possible(lm, live, recordings, checkpointed=baseline.checkpointing)
            # The teacher runs without gradient, so the student's own weights can stand in for it.
            two_model_loss(lm.model, lm.model, (ids, ids), (ids, ids), 0.2).backward()
            live.label([parameter.grad for parameter in lm.model.parameters()], GRADIENTS)
    return weights, live.peak_by_kind()


def two_model_loss(
    student: Any, teacher: Any, forget: tuple[Tensor, Tensor], retain: tuple[Tensor, Tensor], forget_weight: float
) -> Tensor:
    """Gradient ascent on the forget set plus the KL divergence from a live teacher on the retain set.

    The loss is computed from materialised logits, as in the code of https://aclanthology.org/2025.semeval-1.64.

    Args:
        student, teacher: causal language models of transformers.
        forget, retain: token ids [B, L] and 0/1 masks [B, L], right-padded.
        forget_weight: weight of the ascent.

    Returns the scalar loss in nats.
    """
    ids, mask = forget
    logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()  # [B, L - 1, V]
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)  # [B, L - 1]
    ascent = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    del logits

    ids, mask = retain
    with torch.no_grad():
        p = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)  # [B, L, V]
    q = student(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)  # [B, L, V]
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)  # [B, L]
    return forget_weight * ascent + (kl * mask).sum() / mask.sum()
