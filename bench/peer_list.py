"""The contenders of bench/peers.py: how each is set up, and what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OBJECTIVES = {
    "graddiff": "Gradient ascent on the forget set, KL to the teacher on the retain set",
    "npo": "NPO on the forget set, KL to the teacher on the retain set",
    "dpo": "DPO of a refusal over the forgotten answer, KL to the teacher on the retain set",
    "pairs": "DPO of a refusal over the forgotten answer, without a retain set",
}
LR, BETA = 1e-5, 0.1

# The recipe of `unlearn` for each objective, with the weights that make its loss the contenders' own.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "graddiff": ("graddiff", {"forget_weight": 1.0, "retain_objective": "kl", "retain_weight": 1.0}),
    "npo": ("npo", {"beta": BETA, "forget_weight": 1.0, "retain_weight": 1.0}),
    "dpo": ("dpo", {"beta": BETA, "forget_weight": 2.0, "retain_weight": 1.0}),
    "pairs": ("dpo", {"beta": BETA, "forget_weight": BETA, "retain_objective": "none"}),
}
HANDLERS = {"graddiff": "GradDiff", "npo": "NPO", "dpo": "DPO"}  # open-unlearning's names

OPEN_UNLEARNING_CANNOT = (
    "train without the reference model in memory; read the teacher's predictions from disk; resume (its train.py "
    "passes no checkpoint); pack rows; update weights during the backward pass"
)
TRL_CANNOT = (
    "take a retain set (so no KL, GradDiff or NPO); pack rows (padding_free is disabled in 1.16); update weights "
    "during the backward pass"
)


@dataclass(frozen=True)
class Contender:
    """One trainer in one set-up.

    Attributes:
        name: label in the table.
        script: the worker.
        objectives: what it is compared on.
        python: option with the interpreter that runs it; empty for that of peers.py.
        needs: options that must be given.
        parts: into how many micro-batches it splits a step's rows; 0 for one row in each.
        settings: further values for its job.
        cannot: what it cannot do.
    """

    name: str
    script: str
    objectives: tuple[str, ...]
    python: str = ""
    needs: tuple[str, ...] = ()
    parts: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    cannot: str = ""


def _open_unlearning(name: str, parts: int) -> Contender:
    return Contender(
        f"open-unlearning, {name}",
        "peer_open_unlearning.py",
        ("graddiff", "npo", "dpo"),
        "open_unlearning_python",
        ("open-unlearning", "open-unlearning-python"),
        parts,
        cannot=OPEN_UNLEARNING_CANNOT,
    )


def _trl(name: str, parts: int, precompute: bool) -> Contender:
    return Contender(
        f"TRL, {'precomputed reference' if precompute else 'reference model'}, {name}",
        "peer_trl.py",
        ("pairs",),
        "trl_python",
        ("trl-python",),
        parts,
        {"precompute": precompute, "beta": BETA},
        TRL_CANNOT if precompute else f"{TRL_CANNOT}; train without the reference model in memory",
    )


CONTENDERS = (
    Contender(
        "neko-lean", "peer_neko.py", tuple(OBJECTIVES), cannot="start without a pass of the teacher over the rows"
    ),
    _open_unlearning("whole batch", 1),
    _open_unlearning("row by row", 0),
    _trl("row by row", 0, False),
    _trl("whole batch", 1, True),
    _trl("row by row", 0, True),
    Contender(
        "two models, our code, torch AdamW",
        "peer_two_models.py",
        ("graddiff",),
        cannot="train without the reference model in memory; 8-bit optimizer state; resume; pack rows",
    ),
)


def job_of(contender: Contender, objective: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """What a contender's job has in addition to `common`, for one objective."""
    rows = common["rows_per_step"]
    accumulation = contender.parts or rows
    recipe, values = RECIPES[objective]
    overrides = {
        **values, "format": common["format"], "max_length": common["max_length"], "dtype": common["dtype"],
        "forget_rows": rows, "max_steps": common["steps"], "lr": LR, "schedule": "constant",
    }  # fmt: skip
    if objective != "pairs":
        overrides["retain_rows"] = rows
    method: dict[str, Any] = {"gamma": 1.0, "alpha": 1.0, "retain_loss_type": "KL"}
    if objective != "graddiff":
        method["beta"] = BETA
    return {
        "objective": objective, "recipe": recipe, "overrides": overrides, "with_retain": objective != "pairs",
        "handler": HANDLERS.get(objective), "method_args": method, "lr": LR, "optim": "adamw_bnb_8bit",
        "accumulation": accumulation, "batch": rows // accumulation, **contender.settings,
    }  # fmt: skip
