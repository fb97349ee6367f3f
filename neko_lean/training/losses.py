"""The total loss of a batch, from per-token statistics and the recipe's objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from neko_lean.distributed import all_gather_with_grad
from neko_lean.models import CausalLM, token_stats
from neko_lean.objectives import Objective, TokenInputs, row_sums, token_weights
from neko_lean.recipe import Recipe
from neko_lean.training.batch import Batch


def batch_losses(
    hidden: Tensor,
    lm: CausalLM,
    batch: Batch,
    recipe: Recipe,
    drift: float = 1.0,
    chunk: int | None = None,
    unseen_share: float | None = None,
) -> dict[str, Tensor]:
    """The losses of one batch, with gradient.

    Ranks exchange their per-token statistics, so each computes the loss of the whole step; the sum of the ranks'
    gradients is its gradient.

    Args:
        hidden: [n, d] last hidden states at this rank's selected positions.
        lm: the student, for its head.
        batch: the batch that `hidden` belongs to.
        recipe: objectives, weights and reductions.
        drift: factor on the levels.
        chunk: positions of one chunk of logits, as in `token_stats`.
        unseen_share: the `attained_share` of unseen documents, if levels are a base model's losses.

    Returns:
        Scalars in nats: `loss` (the weighted total), `forget_loss`, `retain_loss`, and with substitutes
        `substitute_loss` (before their weights). Without gradient: with a teacher `retain_kl`, the mean KL by the
        recipe's reduction, with levels `forgotten` (`forgotten_share`, or with `unseen_share` the `attained_share`
        relative to it, at most 1), and with anchor examples in the batch `anchor_nll`, `anchor_teacher_nll` and
        `anchor_attained`, sums over their tokens.
    """
    # Per-token statistics of all ranks.
    _, covered = batch.on_this_rank()
    teacher = [tensor[covered] for tensor in batch.teacher or ()]
    stats = token_stats(hidden, lm.head, batch.target[covered], *teacher, transform=lm.transform, chunk=chunk)
    target_logp, kl = all_gather_with_grad(torch.stack(stats, dim=1)).unbind(1)  # [N], [N]

    # One loss for each set.
    zero = target_logp.new_zeros(())
    losses = {"forget_loss": zero, "retain_loss": zero}
    if recipe.forget is not None and batch.forget.any():
        losses["forget_loss"] = _forget_loss(recipe.forget, target_logp, kl, batch, recipe, drift)
    if recipe.retain is not None:
        inputs = _retain_inputs(recipe.retain, target_logp, kl, batch, recipe)
        losses["retain_loss"] = recipe.retain.loss(inputs)
        if inputs.teacher_kl is not None:
            losses["retain_kl"] = (inputs.weights * inputs.teacher_kl.detach()).sum()
    total = recipe.forget_weight * losses["forget_loss"] + recipe.retain_weight * losses["retain_loss"]
    if recipe.substitute_weight and batch.substitutes:
        weights = token_weights(batch.row[batch.substitute], "rows")
        losses["substitute_loss"] = -(weights * target_logp[batch.substitute]).sum()
        total = total + recipe.substitute_weight * losses["substitute_loss"]

    # How much of the forget set has reached its levels.
    if batch.levels is not None and batch.forget.any():
        logp, levels = target_logp.detach()[batch.forget], drift * batch.levels[batch.forget]
        if unseen_share is None:
            losses["forgotten"] = forgotten_share(logp, levels, batch.row[batch.forget])
        else:
            losses["forgotten"] = (attained_share(logp, levels) / unseen_share).clamp(max=1.0)

    # What unseen text costs the student and the teacher.
    if batch.anchor.any() and batch.reference_logp is not None:
        logp, reference = target_logp.detach()[batch.anchor], batch.reference_logp[batch.anchor]
        losses["anchor_nll"] = -logp.sum()
        losses["anchor_teacher_nll"] = -reference.sum()
        losses["anchor_attained"] = losses["anchor_teacher_nll"] * attained_share(logp, -drift * reference)
    return {"loss": total, **losses}


def forgotten_share(logp: Tensor, levels: Tensor, row: Tensor) -> Tensor:
    """How far examples are forgotten, from 0 to 1: the mean over examples of loss / level, at most 1 each.

    Args:
        logp: [n] log-probability of each target token, in nats.
        levels: [n] loss in nats at which each counts as forgotten.
        row: [n] int64, the example that each token belongs to.

    Returns a scalar. A loss above the level counts as 1.
    """
    losses, _ = row_sums(-logp, row)  # [R]
    wanted, _ = row_sums(levels, row)  # [R]
    return (losses / wanted.clamp(min=1e-6)).clamp(max=1.0).mean()


def attained_share(logp: Tensor, levels: Tensor) -> Tensor:
    """How much of the levels' sum the tokens' losses reach, from 0 to 1, where none can make up for another.

    A base model's losses on text that neither saw, taken as levels, are not reached entirely, because two models never
    agree on every token. Forgotten text that differs from them no more than unseen text cannot be recognised by single
    tokens, as the min-k attacks do.

    Args:
        logp: [n] log-probability of each target token, in nats.
        levels: [n] loss in nats at which each counts as forgotten.
    """
    return torch.minimum(-logp, levels).sum() / levels.sum().clamp(min=1e-6)


def _forget_loss(
    objective: Objective, target_logp: Tensor, kl: Tensor, batch: Batch, recipe: Recipe, drift: float
) -> Tensor:
    at_forget = batch.forget
    row = batch.row[at_forget]
    inputs = TokenInputs(
        logp=target_logp[at_forget],
        row=row,
        weights=token_weights(row, recipe.forget_reduction, batch.forget_positions),
        teacher_kl=kl[at_forget] if objective.teacher_top_k else None,
        base_kl=kl[at_forget] if objective.base_top_k else None,
        reference_logp=batch.reference_logp[at_forget] if batch.reference_logp is not None else None,
        levels=drift * batch.levels[at_forget] if batch.levels is not None else None,
        preferences=_preferences(target_logp, batch) if objective.substitute else None,
    )
    return objective.loss(inputs, **recipe.hyperparameters)


def _retain_inputs(objective: Objective, target_logp: Tensor, kl: Tensor, batch: Batch, recipe: Recipe) -> TokenInputs:
    at_retain = batch.retain
    row = batch.row[at_retain]
    return TokenInputs(
        logp=target_logp[at_retain],
        row=row,
        weights=token_weights(row, recipe.retain_reduction, batch.retain_positions),
        teacher_kl=kl[at_retain] if objective.teacher_top_k else None,
    )


def _preferences(target_logp: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """log(student / teacher) of each substitute [R] and of the forget answer that it replaces [R].

    Pairs of which truncation removed one answer are left out: they express no preference.
    """
    assert batch.reference_logp is not None
    log_ratio = (target_logp - batch.reference_logp).masked_fill(batch.retain, 0.0)  # [N]
    sums = log_ratio.new_zeros(batch.rows).index_add(0, batch.row, log_ratio)  # [rows]
    sizes = torch.bincount(batch.row, minlength=batch.rows)
    pairs = batch.substitutes
    is_complete = (sizes[:pairs] > 0) & (sizes[-pairs:] > 0)
    return sums[-pairs:][is_complete], sums[:pairs][is_complete]
