"""Forgetting towards the teacher's own distribution, in which memorized tokens are only as likely as in unseen text."""

from __future__ import annotations

import torch
from torch import Tensor

from neko_lean.objectives.base_kl import kl_and_push
from neko_lean.objectives.calibrated import LEVEL
from neko_lean.objectives.registry import Hyperparameter, TokenInputs, forget_objective

# Lowest level in nats: at 0, a target token would leave no probability to others.
LOWEST_LEVEL = 1e-4


def lower_to_level(
    topk_ids: Tensor, topk_logp: Tensor, tail_logp: Tensor, target: Tensor, reference_logp: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's distribution after the target token is made as unlikely as in unseen text.

    Its loss becomes its level, if it was lower. The other tokens share the rest as they did before, so what the teacher
    would have said instead stays grammatical. A target outside the top k is not changed.

    Args:
        topk_ids: [N, k] int64 token ids of the teacher's top k.
        topk_logp: [N, k] their log-probabilities; -inf marks an unused entry.
        tail_logp: [N] log of the probability that all other tokens share.
        target: [N] int64, the memorized token.
        reference_logp: [N] the teacher's log-probability of it.
        levels: [N] loss in nats at which the token counts as forgotten.

    Returns:
        ids, log-probabilities and tail of the same shapes, normalized.
    """
    is_target = (topk_ids == target[:, None]) & (topk_logp > -torch.inf)  # [N, k]
    lowered = torch.minimum(reference_logp, -levels.clamp(min=LOWEST_LEVEL))  # [N]
    rest = torch.log(-torch.expm1(lowered))  # [N] what the other tokens share then

    others = torch.cat([topk_logp.masked_fill(is_target, -torch.inf), tail_logp[:, None]], dim=1)  # [N, k + 1]
    others[others.logsumexp(1).isneginf(), -1] = 0.0  # the teacher was certain: everything goes to the tail
    others = others + (rest - others.logsumexp(1))[:, None]
    logp = torch.where(is_target, lowered[:, None], others[:, :-1])

    is_edited = is_target.any(1)
    return topk_ids, torch.where(is_edited[:, None], logp, topk_logp), torch.where(is_edited, others[:, -1], tail_logp)


@forget_objective(
    "edited_kl",
    levels=True,
    reference=True,
    teacher_top_k=True,
    teacher_targets=lower_to_level,
    hyperparameters={
        "level": LEVEL,
        "push": Hyperparameter(1.0, "weight of calibrated's push to the levels", positive=False),
    },
)
def edited_kl(inputs: TokenInputs, *, level: float, push: float) -> Tensor:
    """KL(edited teacher || student) in nats a position, weighted as in `focal_mean`, plus `push` times `calibrated`."""
    assert inputs.teacher_kl is not None
    return kl_and_push(inputs.teacher_kl, inputs, push)
