"""Direct preference optimization of a refusal over the forgotten answer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from neko_lean.objectives.registry import Hyperparameter, TokenInputs, forget_objective


@forget_objective(
    "dpo",
    reference=True,
    substitute="refusal",
    row_means=True,
    hyperparameters={"beta": Hyperparameter(0.1, "how sharply an example's gradient fades as the refusal wins")},
)
def dpo(inputs: TokenInputs, *, beta: float) -> Tensor:
    """Mean over examples of -1 / beta * log sigmoid(beta * (chosen - rejected)), each a sum over an answer's tokens of
    log(student / teacher) (arXiv 2305.18290, eq. 7, scaled by 1 / beta as in arXiv 2404.05868, eq. 2)."""
    assert inputs.preferences is not None
    chosen, rejected = inputs.preferences  # [R], [R]
    return F.softplus(beta * (rejected - chosen)).sum() / (beta * max(len(chosen), 1))
