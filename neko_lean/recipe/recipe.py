"""A recipe: every hyperparameter of a run, and what a run with it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neko_lean.objectives import FORGET_OBJECTIVES, RETAIN_OBJECTIVES, Objective

AUTO = "auto"  # a learning rate that follows from the model, see `runs.learning_rates`


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every value of a recipe; `explanations.py` says what each means.

    The hyperparameters of the forget objective are in `hyperparameters`, which holds no others.
    """

    name: str
    summary: str

    format: str
    system: str
    max_length: int
    append_eos: bool
    forget_rows: int
    retain_rows: int
    self_generated: int
    batch_tokens: int
    order: str
    chunk_rows: int

    forget_objective: str
    forget_weight: float
    forget_reduction: str
    forget_span: str
    answer_skip: int
    substitute: str
    substitute_weight: float

    retain_objective: str
    retain_weight: float
    retain_reduction: str

    lr: float | str
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    schedule: str
    warmup: float
    max_steps: int
    epochs: float
    train_last: int
    train_only: str
    lora_rank: int
    lora_alpha: float
    lora_targets: str
    quantize_base: str
    dropout: bool

    eval_every: int
    eval_rows: int
    patience: int
    choose: str
    stop: str

    dtype: str
    backward: str
    micro_tokens: int
    offload_state: bool
    offload_activations: bool
    state_bits: int
    compile: bool

    hyperparameters: Mapping[str, float]

    @property
    def forget(self) -> Objective | None:
        """The forget objective; None for 'none'."""
        return FORGET_OBJECTIVES.get(self.forget_objective)

    @property
    def retain(self) -> Objective | None:
        """The retain objective; None for 'none'."""
        return RETAIN_OBJECTIVES.get(self.retain_objective)

    def values(self) -> dict[str, Any]:
        """Every value by its key in a recipe file, as run.json holds them."""
        values = dataclasses.asdict(self)
        hyperparameters = values.pop("hyperparameters")
        return {**values, **hyperparameters}


def forgets(recipe: Recipe) -> bool:
    """Whether a run reads the forget set."""
    return recipe.forget is not None or recipe.substitute != "none"


def reads_retain(recipe: Recipe) -> bool:
    """Whether a run reads the retain set: for its objective, or for the answers of its examples."""
    return recipe.retain is not None or substitutes_retain_answers(recipe)


def substitutes_retain_answers(recipe: Recipe) -> bool:
    """Whether the forget answers are replaced by answers of the retain set."""
    return recipe.substitute in ("random", "similar")


def uses_anchor(recipe: Recipe, *, base_cache: bool = False) -> bool:
    """Whether an anchor changes a run: as retain examples, or as the source of levels if there is no `base_cache`."""
    return recipe.retain is not None or (uses_levels(recipe) and not base_cache)


def uses_levels(recipe: Recipe) -> bool:
    """Whether the forget objective reads the loss at which each token counts as forgotten."""
    return recipe.forget is not None and recipe.forget.levels


def needs_forget_cache(recipe: Recipe) -> bool:
    """Whether a run reads the teacher's log-probabilities of the forget set, and so a cache made with `--forget`."""
    return recipe.forget is not None and recipe.forget.reference


def reads_forget_losses(recipe: Recipe, *, anchor: bool) -> bool:
    """Whether a run reads the teacher's log-probabilities of the forget set where the cache holds them: it needs them,
    or it has an anchor and spreads its levels by them."""
    return needs_forget_cache(recipe) or (uses_levels(recipe) and anchor)


def needs_alternatives(recipe: Recipe) -> bool:
    """Whether a run reads what the teacher would say instead of a memorized token, and so a cache of mass 1: the fewest
    tokens whose probability sums to less are, where the teacher is certain, that token alone."""
    return recipe.forget is not None and recipe.forget.teacher_top_k


def trains_on_teacher(recipe: Recipe) -> bool:
    """Whether a run distils the teacher's top-k distribution on the retain set."""
    return recipe.retain is not None and recipe.retain.teacher_top_k


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a run reads a teacher cache, with or without an anchor."""
    return trains_on_teacher(recipe) or needs_forget_cache(recipe)


def reads_cache(recipe: Recipe, *, anchor: bool) -> bool:
    """Whether a run reads a teacher cache, given that it has an anchor or has none."""
    return needs_teacher(recipe) or (uses_levels(recipe) and anchor)
