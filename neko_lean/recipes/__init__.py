"""Recipes: one TOML file a method, the only place for hyperparameters; read, overridden and checked here."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neko_lean.data import FORMATS
from neko_lean.errors import NekoLeanError
from neko_lean.objectives import FORGET, REDUCTIONS, RETAIN

DEFAULT = "calibrated"
FOLDER = Path(__file__).parent
SCHEDULES = ("linear", "constant")
BACKWARD = ("layerwise", "checkpointed", "plain")
NEED_FORGET_CACHE = ("npo", "dpo", "undial")  # objectives that read what the teacher thought of forget rows
ORDERS = ("together", "alternating", "chunks")
CHOICES = ("last", "loss", "quality")
SUBSTITUTES = ("none", "refusal", "random")
SPANS = ("answers", "all", "documents")


@dataclass(frozen=True)
class Recipe:
    """Every hyperparameter of a run. Loss = forget_weight * forget + retain_weight * retain, in nats."""

    name: str
    summary: str
    format: str  # prompt format: plain or neko
    max_length: int  # tokens a row is cut to
    forget_objective: str  # one of objectives.FORGET
    forget_weight: float
    forget_reduction: str  # tokens, rows or positions; see objectives.token_weights
    answer_skip: int  # answer tokens at the start of each answer that get no loss
    retain_objective: str  # none, kl (needs a teacher cache) or ce
    retain_weight: float
    retain_reduction: str
    forget_rows: int  # rows a step, at most
    retain_rows: int
    batch_tokens: int  # tokens a step, at most
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    schedule: str  # linear (to 0 at the last step) or constant
    warmup: float  # share of the steps over which lr rises from 0
    max_steps: int  # 0: as many as `epochs` take
    epochs: float  # passes over the larger set; counts only where max_steps is 0
    append_eos: bool  # the answer ends in the EOS token
    eval_every: int  # steps between evaluations of the total loss on a fixed sample; 0: never
    eval_rows: int  # rows of each set in that sample
    patience: int  # evaluations without improvement before stopping; 0: never stop early
    clip: float  # largest L2 norm of one tensor's gradient; 0: none
    train_last: int  # only the last N layers, the final norm and an untied head learn; 0: everything
    dtype: str  # weights: bfloat16 (rounded stochastically) or float32
    measured: str = ""  # what bench/quality.py found, in a line
    forget_span: str = "answers"  # which tokens of a forget row are pushed: answers, all, or all of sc rows only
    beta: float = 0.1  # of npo, simnpo and dpo: how sharply a row is let go; of wga: power of the probability
    gamma: float = 0.0  # of simnpo: margin; of undial: what is taken off the memorised token's logit
    level: float = 5.0  # of calibrated without an anchor: nats at which a token is forgotten enough
    order: str = "together"  # of a step's sets; or alternating, one set a step; or chunks, see schedules.phases
    chunk_rows: int = 32  # of order chunks: forget rows a chunk
    choose: str = "last"  # whose weights are the output: the last step's, or of the best eval by loss or quality
    train_only: str = ""  # only parameters in whose names this regular expression is found learn
    substitute: str = "none"  # refusal, or random (a retain answer): put in the place of each forget row's answer
    substitute_weight: float = 0.0  # of the cross-entropy on substitutes
    # What follows changes memory and speed, not what is computed; a TOML may leave it out.
    backward: str = "layerwise"  # or checkpointed (any family), or plain (all activations kept: for small models)
    micro_tokens: int = 2048  # positions that one layer works on at a time, padding included
    offload_state: bool = False  # Adam's state in host memory
    offload_activations: bool = False  # the layers' inputs in host memory; layerwise only
    state_bits: int = 8  # of Adam's state; 4 needs torchao
    dropout: bool = False  # train with the config's dropout, which the teacher ran without; not with backward layerwise
    compile: bool = False  # the decoder layers by torch.compile; rounds otherwise, docs/profile.md


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a run reads a teacher cache."""
    return recipe.retain_objective == "kl" or recipe.forget_objective in NEED_FORGET_CACHE


def forgets(recipe: Recipe) -> bool:
    """Whether a run looks at forget rows."""
    return recipe.forget_objective != "none" or recipe.substitute != "none"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with neko-lean."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The shipped recipe called `name`, or the one in the TOML file at that path, with `overrides` laid over it.

    Raises NekoLeanError naming the unknown key, the missing key, or the value that cannot be.
    """
    path = Path(name) if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise NekoLeanError(f"recipe {str(name)!r} is unknown: use {', '.join(recipe_names())}, or a .toml file.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NekoLeanError(f"{path} is not readable TOML: {error}.") from error
    values = {"name": path.stem, **values, **(overrides or {})}
    known = {f.name: str(f.type) for f in dataclasses.fields(Recipe)}
    for key, value in values.items():
        if key not in known:
            raise NekoLeanError(f"recipe {path.stem}: {key!r} is no value of a recipe: use {', '.join(known)}.")
        values[key] = _typed(key, value, known[key])
    required = [f.name for f in dataclasses.fields(Recipe) if f.default is dataclasses.MISSING]
    missing = [key for key in required if key not in values]
    if missing:
        raise NekoLeanError(f"{path} lacks {', '.join(missing)}.")
    return _checked(Recipe(**values))


def parse_override(text: str) -> tuple[str, Any]:
    """'lr=1e-5' -> ('lr', 1e-5); a value that is no TOML is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise NekoLeanError(f"--set {text!r} is not key=value.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _typed(key: str, value: Any, wanted: str) -> Any:
    if wanted == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != wanted:
        raise NekoLeanError(f"recipe value {key} is {value!r}, which is no {wanted}.")
    return value


def _checked(recipe: Recipe) -> Recipe:
    choices = {
        "format": FORMATS,
        "forget_objective": FORGET,
        "forget_reduction": REDUCTIONS,
        "retain_objective": RETAIN,
        "retain_reduction": REDUCTIONS,
        "schedule": SCHEDULES,
        "dtype": ("bfloat16", "float32"),
        "backward": BACKWARD,
        "forget_span": SPANS,
        "substitute": SUBSTITUTES,
        "order": ORDERS,
        "choose": CHOICES,
    }
    for key, allowed in choices.items():
        if getattr(recipe, key) not in allowed:
            raise NekoLeanError(f"recipe value {key} is {getattr(recipe, key)!r}, not one of {', '.join(allowed)}.")
    positive = (
        "max_length",
        "forget_rows",
        "retain_rows",
        "batch_tokens",
        "micro_tokens",
        "eval_rows",
        "lr",
        "eps",
        "beta",
        "chunk_rows",
    )
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        if field.type not in ("int", "float"):
            continue
        if not (value > 0 if field.name in positive else value >= 0):
            raise NekoLeanError(f"recipe value {field.name} is {value!r}: it must be larger.")
    if not (recipe.beta1 < 1 and recipe.beta2 < 1 and recipe.warmup < 1):
        raise NekoLeanError(f"recipe {recipe.name}: beta1, beta2 and warmup must be below 1.")
    if recipe.forget_objective == "dpo" and recipe.substitute != "refusal":
        raise NekoLeanError("dpo prefers a refusal to the answer: it needs substitute refusal.")
    if recipe.forget_objective == "undial" and (recipe.retain_objective != "kl" or not recipe.gamma):
        raise NekoLeanError("undial distils what the cache holds: it needs retain_objective kl, and gamma above 0.")
    if (recipe.substitute == "none") != (not recipe.substitute_weight) and recipe.forget_objective != "dpo":
        raise NekoLeanError("substitute and substitute_weight go together: give both or neither.")
    if recipe.choose != "last" and not recipe.eval_every:
        raise NekoLeanError(f"recipe {recipe.name}: choose {recipe.choose} needs eval_every above 0.")
    try:
        re.compile(recipe.train_only)
    except re.error as error:
        raise NekoLeanError(f"train_only {recipe.train_only!r} is no regular expression ({error}).") from error
    if recipe.state_bits not in (4, 8):
        raise NekoLeanError(f"recipe value state_bits is {recipe.state_bits}: it is 8, or 4 with torchao.")
    if recipe.dropout and recipe.backward == "layerwise":
        raise NekoLeanError(
            "dropout=true needs backward=checkpointed or backward=plain: layerwise runs each layer twice in a step."
        )
    if recipe.offload_activations and recipe.backward != "layerwise":
        raise NekoLeanError("offload_activations needs backward=layerwise: no other keeps layer inputs apart.")
    if recipe.forget_objective == recipe.retain_objective == "none":
        raise NekoLeanError(f"recipe {recipe.name} has neither a forget nor a retain objective.")
    if not recipe.max_steps and not recipe.epochs:
        raise NekoLeanError(f"recipe {recipe.name}: one of max_steps and epochs must be above 0.")
    return recipe
