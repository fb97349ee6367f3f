"""Self-distillation with the memorized token's logit lowered (UNDIAL)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neko_lean.objectives.registry import Hyperparameter, TokenInputs, forget_objective


def lower_target_logit(
    topk_ids: Tensor, topk_logp: Tensor, tail_logp: Tensor, target: Tensor, reference_logp: Tensor, *, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's distribution after `gamma` is subtracted from the logit of the memorized token (arXiv 2402.10052,
    eq. 3).

    Args:
        topk_ids: [N, k] int64 token ids of the teacher's top k.
        topk_logp: [N, k] their log-probabilities; -inf marks an unused entry.
        tail_logp: [N] log of the probability that all other tokens share.
        target: [N] int64, the memorized token.
        reference_logp: [N] the teacher's log-probability of it. A target outside the top k is taken out of the tail.
        gamma: what is subtracted, > 0.

    Returns:
        ids, log-probabilities and tail of the same shapes, normalized again.
    """
    is_target = (topk_ids == target[:, None]) & (topk_logp > -torch.inf)  # [N, k]
    removed = torch.where(is_target.any(1), -torch.inf, reference_logp + math.log(-math.expm1(-gamma)))  # [N]
    logp = topk_logp - gamma * is_target

    # Rounding may leave less in the tail than what is removed: then nothing stays in it.
    tail = tail_logp + torch.log(-torch.expm1((removed - tail_logp).nan_to_num(-torch.inf).clamp(max=0)))
    total = torch.cat([logp, tail[:, None]], dim=1).logsumexp(1)  # [N]
    return topk_ids, logp - total[:, None], tail - total


@forget_objective(
    "undial",
    reference=True,
    teacher_top_k=True,
    teacher_targets=lower_target_logit,
    hyperparameters={"gamma": Hyperparameter(10.0, "subtracted from the memorized token's logit")},
)
def undial(inputs: TokenInputs, *, gamma: float) -> Tensor:
    """KL from the teacher with lowered target logits to the student, in nats a position (UNDIAL, arXiv 2402.10052)."""
    assert inputs.teacher_kl is not None
    return (inputs.weights * inputs.teacher_kl).sum()
