"""The total loss of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from neko_lean import objectives
from neko_lean.distributed import all_gather_with_grad
from neko_lean.models import CausalLM, token_stats
from neko_lean.recipes import Recipe
from neko_lean.training.batch import Batch


def batch_losses(
    hidden: Tensor, lm: CausalLM, batch: Batch, recipe: Recipe, drift: float = 1.0, chunk: int | None = None
) -> dict[str, Tensor]:
    """Scalars `loss`, `forget_loss`, `retain_loss` and, with substitutes, `substitute_loss` (nats, before their
    weights) of one batch, with gradient, from the last hidden states [n, d] of this rank's positions and the head of
    `lm`. Ranks tell each other what token_stats gave: the loss is that of the whole step, and adding up the ranks'
    gradients gives its gradient.

    Levels are multiplied by `drift`. With an anchor's documents in the batch there are also `anchor_nll` and
    `anchor_teacher_nll`, sums over their tokens, without gradient. `chunk` is as in token_stats.
    """
    place = batch.own()[1]
    teacher = [one[place] for one in batch.teacher or ()]
    stats = token_stats(hidden, lm.head, batch.target[place], *teacher, transform=lm.transform, chunk=chunk)
    target_logp, kl = all_gather_with_grad(torch.stack(stats, dim=1)).unbind(1)
    zero = target_logp.new_zeros(())
    losses = {"forget_loss": zero, "retain_loss": zero}
    if recipe.forget_objective != "none" and batch.forget.any():
        losses["forget_loss"] = _forget_loss(target_logp, kl, batch, recipe, drift)
    weights = objectives.token_weights(batch.row[batch.retain], recipe.retain_reduction, batch.retain_positions)
    if recipe.retain_objective == "kl":
        losses["retain_loss"] = objectives.teacher_kl(kl[batch.retain], weights)
    elif recipe.retain_objective == "ce":
        losses["retain_loss"] = objectives.cross_entropy(target_logp[batch.retain], weights)
    total = recipe.forget_weight * losses["forget_loss"] + recipe.retain_weight * losses["retain_loss"]
    if recipe.substitute_weight and batch.substitutes:
        weights = objectives.token_weights(batch.row[batch.substitute], "rows")
        losses["substitute_loss"] = objectives.cross_entropy(target_logp[batch.substitute], weights)
        total = total + recipe.substitute_weight * losses["substitute_loss"]
    if batch.anchor.any() and batch.reference is not None:
        losses["anchor_nll"] = -target_logp.detach()[batch.anchor].sum()
        losses["anchor_teacher_nll"] = -batch.reference[batch.anchor].sum()
    return {"loss": total, **losses}


def _forget_loss(target_logp: Tensor, kl: Tensor, batch: Batch, recipe: Recipe, drift: float) -> Tensor:
    """The recipe's forget objective, from the vectors [N] that token_stats gave for a batch."""
    logp, row = target_logp[batch.forget], batch.row[batch.forget]
    weights = objectives.token_weights(row, recipe.forget_reduction, batch.forget_positions)
    if recipe.forget_objective == "ga":
        return objectives.gradient_ascent(logp, weights)
    if recipe.forget_objective == "wga":
        return objectives.weighted_ascent(logp, weights, recipe.beta)
    if recipe.forget_objective == "simnpo":
        return objectives.simnpo(logp, row, recipe.beta, recipe.gamma)
    if recipe.forget_objective == "undial":
        return objectives.teacher_kl(kl[batch.forget], weights)
    if recipe.forget_objective == "calibrated":
        assert batch.level is not None
        return objectives.calibrated(logp, drift * batch.level[batch.forget], row, weights)
    assert batch.reference is not None
    if recipe.forget_objective == "dpo":
        ratio = (target_logp - batch.reference).masked_fill(batch.retain, 0.0)
        sums = ratio.new_zeros(batch.rows).index_add(0, batch.row, ratio)  # [rows]
        sizes = torch.bincount(batch.row, minlength=batch.rows)
        pairs = batch.substitutes
        both = (sizes[:pairs] > 0) & (sizes[-pairs:] > 0)  # a row whose answer was cut off has no preference
        return objectives.dpo(sums[-pairs:][both], sums[:pairs][both], recipe.beta)
    return objectives.npo(logp, batch.reference[batch.forget], row, recipe.beta)
