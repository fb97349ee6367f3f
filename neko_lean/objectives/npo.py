"""Negative preference optimization, with a reference model (NPO) and without one (SimNPO)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from neko_lean.objectives.reductions import row_sums
from neko_lean.objectives.registry import Hyperparameter, TokenInputs, forget_objective


@forget_objective(
    "npo",
    reference=True,
    row_means=True,
    hyperparameters={"beta": Hyperparameter(0.1, "how sharply an example's gradient fades as it is forgotten")},
)
def npo(inputs: TokenInputs, *, beta: float) -> Tensor:
    """Mean over examples of 2 / beta * log(1 + (q / p)^beta), with q and p the student's and the teacher's probability
    of the example's whole answer (NPO, arXiv 2404.05868, eq. 3)."""
    assert inputs.reference_logp is not None
    log_ratio, _ = row_sums(inputs.logp - inputs.reference_logp, inputs.row)  # [R]
    return 2 / beta * F.softplus(beta * log_ratio).sum() / max(len(log_ratio), 1)


@forget_objective(
    "simnpo",
    row_means=True,
    hyperparameters={
        "beta": Hyperparameter(2.5, "how sharply an example's gradient fades as it is forgotten"),
        "gamma": Hyperparameter(0.0, "margin added to the mean log-probability", positive=False),
    },
)
def simnpo(inputs: TokenInputs, *, beta: float, gamma: float) -> Tensor:
    """NPO without a reference: the mean log-probability of an example's tokens replaces the log-ratio (SimNPO, arXiv
    2410.07163, eq. 4)."""
    total, count = row_sums(inputs.logp, inputs.row)  # [R], [R]
    return 2 / beta * F.softplus(beta * total / count + gamma).sum() / max(len(total), 1)
