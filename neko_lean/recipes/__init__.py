"""Recipes: one TOML file a method, the only place for hyperparameters; read, overridden and checked here."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
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
ROW_MEANS = ("npo", "simnpo", "dpo")  # objectives that are means over rows by definition
ORDERS = ("together", "alternating", "chunks")
CHOICES = ("last", "loss", "quality")
SUBSTITUTES = ("none", "refusal", "random")
SPANS = ("answers", "all", "documents")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every hyperparameter of a run. Loss = forget_weight * forget + retain_weight * retain, in nats.

    A key without effect, given the other keys (see `NEEDS`), has its default value.
    """

    name: str
    summary: str
    format: str  # prompt format: plain or neko
    max_length: int  # tokens a row is cut to
    forget_objective: str  # one of objectives.FORGET
    forget_weight: float = 0.0
    forget_reduction: str = "rows"  # tokens, rows or positions; see objectives.token_weights
    answer_skip: int = 0  # answer tokens at the start of each answer that get no loss
    retain_objective: str  # none, kl (needs a teacher cache) or ce
    retain_weight: float = 0.0
    retain_reduction: str = "tokens"
    forget_rows: int = 16  # rows a step, at most
    retain_rows: int = 16
    batch_tokens: int  # tokens a step, at most
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    schedule: str  # linear (to 0 at the last step) or constant
    warmup: float  # share of the steps over which lr rises from 0
    max_steps: int  # 0: as many as `epochs` take
    epochs: float = 0.0  # passes over the larger set; counts where max_steps is 0, and in order chunks
    append_eos: bool  # the answer ends in the EOS token
    eval_every: int  # steps between evaluations of the total loss on a fixed sample; 0: never
    eval_rows: int = 32  # rows of each set in that sample
    patience: int = 0  # evaluations without improvement before stopping; 0: never stop early
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


# Keys that have an effect only together with certain others: a test of that, and the requirement in words.
NEEDS: dict[str, tuple[Callable[[Recipe], bool], str]] = {
    "forget_weight": (lambda r: r.forget_objective != "none", "a forget_objective"),
    "forget_reduction": (
        lambda r: r.forget_objective not in ("none", *ROW_MEANS),
        f"a forget_objective other than {', '.join(ROW_MEANS)}, which are means over rows",
    ),
    "forget_span": (lambda r: r.forget_objective != "none", "a forget_objective"),
    "answer_skip": (
        lambda r: r.forget_objective != "none" and r.forget_span != "all",
        "a forget_objective, and forget_span answers or documents",
    ),
    "forget_rows": (lambda r: forgets(r), "a forget_objective or a substitute"),
    "retain_weight": (lambda r: r.retain_objective != "none", "a retain_objective"),
    "retain_reduction": (lambda r: r.retain_objective != "none", "a retain_objective"),
    "retain_rows": (lambda r: r.retain_objective != "none", "a retain_objective"),
    "beta": (
        lambda r: r.forget_objective in ("wga", "npo", "simnpo", "dpo"),
        "forget_objective wga, npo, simnpo or dpo",
    ),
    "gamma": (lambda r: r.forget_objective in ("simnpo", "undial"), "forget_objective simnpo or undial"),
    "level": (lambda r: r.forget_objective == "calibrated", "forget_objective calibrated"),
    "chunk_rows": (lambda r: r.order == "chunks", "order chunks"),
    "substitute_weight": (lambda r: r.substitute != "none", "a substitute, as the two go together"),
    "epochs": (lambda r: not r.max_steps or r.order == "chunks", "max_steps 0, or order chunks"),
    "eval_rows": (lambda r: bool(r.eval_every), "eval_every above 0"),
    "patience": (lambda r: bool(r.eval_every), "eval_every above 0"),
}
LIMITS = ("forget_rows", "retain_rows", "eval_rows")  # upper bounds, which may be out of reach
# Required where they have an effect, since no default would suit most methods.
WANTED = (
    "forget_weight",
    "forget_reduction",
    "answer_skip",
    "retain_weight",
    "retain_reduction",
    "forget_rows",
    "retain_rows",
)
# Keys that files once had to give whether or not they had an effect, and the values by which they claimed none.
TOLERATED: dict[str, tuple[Any, ...]] = {
    "forget_weight": (0.0,),
    "forget_reduction": ("tokens", "rows"),
    "answer_skip": (0,),
    "retain_weight": (0.0,),
    "retain_reduction": ("tokens", "rows"),
    "epochs": (0.0,),
    "patience": (0,),
}


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a run reads a teacher cache."""
    return recipe.retain_objective == "kl" or recipe.forget_objective in NEED_FORGET_CACHE


def forgets(recipe: Recipe) -> bool:
    """Whether a run looks at forget rows."""
    return recipe.forget_objective != "none" or recipe.substitute != "none"


def reads_retain(recipe: Recipe) -> bool:
    """Whether a run looks at retain rows: to hold them still, or for their answers."""
    return recipe.retain_objective != "none" or recipe.substitute == "random"


def uses_anchor(recipe: Recipe, *, base_cache: bool = False) -> bool:
    """Whether an anchor's documents change a run: as retain rows, or as what tells a forgotten token's cost where no
    `base_cache` does."""
    return recipe.retain_objective != "none" or (recipe.forget_objective == "calibrated" and not base_cache)


def reads_cache(recipe: Recipe, *, anchor: bool) -> bool:
    """Whether a run, with an anchor or without, reads a teacher cache."""
    return needs_teacher(recipe) or (recipe.forget_objective == "calibrated" and anchor)


def has_effect(key: str, recipe: Recipe) -> bool:
    """Whether another value of this key would change a run."""
    return key not in NEEDS or NEEDS[key][0](recipe)


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
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise NekoLeanError(f"{path} is not readable TOML: {error}.") from error
    known = {f.name: str(f.type) for f in dataclasses.fields(Recipe)}
    for key in {**values, **(overrides or {})}:
        if key not in known:
            raise NekoLeanError(f"recipe {path.stem}: {key!r} is no value of a recipe: use {', '.join(known)}.")
    written = {key: _typed(key, value, known[key]) for key, value in {"name": path.stem, **values}.items()}
    changed = {key: _typed(key, value, known[key]) for key, value in (overrides or {}).items()}
    values = {**written, **changed}
    required = [f.name for f in dataclasses.fields(Recipe) if f.default is dataclasses.MISSING]
    missing = [key for key in required if key not in values]
    if missing:
        raise NekoLeanError(f"{path} lacks {', '.join(missing)}.")
    recipe = Recipe(**values)
    if all(key in written for key in required):  # else the file says too little to be judged by itself
        _refuse_without_effect(Recipe(**written), written, in_file=True)
    _refuse_without_effect(recipe, changed, in_file=False)
    missing = [key for key in WANTED if key not in values and has_effect(key, recipe)]
    if missing:
        raise NekoLeanError(
            f"{path} lacks {', '.join(missing)}, which its objectives need: give each by --set or in a file."
        )
    # A key of the file that an override has left without effect: nobody is to read it off run.json.
    idle: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Recipe) if not has_effect(f.name, recipe)}
    return _checked(dataclasses.replace(recipe, **idle))


def _refuse_without_effect(recipe: Recipe, given: Mapping[str, Any], *, in_file: bool) -> None:
    """Raise NekoLeanError for a key that was given but has no effect, since the user expects one."""
    for key, value in given.items():
        if key in LIMITS or has_effect(key, recipe) or (in_file and value in TOLERATED.get(key, ())):
            continue
        if key == "forget_reduction" and recipe.forget_objective in ROW_MEANS and value == "rows":
            continue  # which is what they are
        if key == "epochs" and not in_file and given.get("max_steps"):
            continue  # max_steps, given with it, decides
        fix = "remove it from the file" if in_file else "leave it out"
        raise NekoLeanError(
            f"recipe {recipe.name}: {key} = {value!r} has no effect: it needs {NEEDS[key][1]}; {fix}, or change that."
        )


def parse_override(text: str) -> tuple[str, Any]:
    """'lr=1e-5' -> ('lr', 1e-5); a value that is no TOML is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise NekoLeanError(f"--set {text!r} is not key=value.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise NekoLeanError(f"--set {key.strip()}: the value is not readable TOML ({error}).") from error


def _typed(key: str, value: Any, wanted: str) -> Any:
    if (
        wanted == "float"
        and isinstance(value, int)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    ):
        value = float(value)
    if type(value).__name__ != wanted:
        raise NekoLeanError(f"recipe value {key} must be a {wanted}, got {str(value)[:60]!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise NekoLeanError(f"recipe value {key} must be finite, got {value}.")
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
    if recipe.append_eos and needs_teacher(recipe):
        raise NekoLeanError(
            f"recipe {recipe.name}: append_eos=true does not go with a teacher, whose cache has no EOS after an "
            f"answer: set append_eos=false."
        )
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
    _check_order(recipe)
    return recipe


def _check_order(recipe: Recipe) -> None:
    """Raise NekoLeanError for an order of steps in which there would be none, or in which a turn would be empty."""
    if recipe.order == "chunks" and not forgets(recipe):
        raise NekoLeanError(
            f"recipe {recipe.name}: order chunks cuts the forget rows into chunks, and no objective or substitute "
            f"uses them: take order together."
        )
    if recipe.order == "chunks" and not recipe.epochs:
        raise NekoLeanError(
            f"recipe {recipe.name}: order chunks goes through each chunk `epochs` times, so epochs must be above 0; "
            f"max_steps only says where the chunks end."
        )
    if recipe.order == "alternating" and not (forgets(recipe) and recipe.retain_objective != "none"):
        unused = "retain" if forgets(recipe) else "forget"
        raise NekoLeanError(
            f"recipe {recipe.name}: order alternating takes forget and retain rows in turn, and no objective uses the "
            f"{unused} rows: take order together."
        )
