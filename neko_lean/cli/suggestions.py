"""Name the command, option or recipe key that was probably meant by one that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from neko_lean.errors import Synonyms, closest_names

# What other programs call a command or a parameter, in lower case with hyphens, and our names of it. The first one that
# exists is suggested.
COMMAND_SYNONYMS: Synonyms = {
    "cache": ("cache-teacher",),
    "teacher": ("cache-teacher",),
    "distill": ("cache-teacher",),
    "eval": ("score",),
    "evaluate": ("score",),
    "test": ("score",),
    "finetune": ("memorize",),
    "fine-tune": ("memorize",),
    "memory": ("plan",),
    "train": ("unlearn", "memorize"),
    "forget": ("unlearn",),
    "verify": ("inspect",),
    "show": ("inspect",),
    "methods": ("recipes",),
    "plot": ("report",),
    "example": ("demo",),
}
_OUT = ("out",)
_MODEL = ("model",)
_FORGET = ("forget", "data")
_RETAIN = ("retain", "data")
_DATA = ("data", "forget", "retain")
_BATCH = ("batch_size", "batch_tokens")
PARAMETER_SYNONYMS: Synonyms = {
    **dict.fromkeys(("o", "output", "output-dir", "output-path", "output-file", "save-dir", "save-path", "to"), _OUT),
    **dict.fromkeys(("m", "model", "model-name", "model-path", "model-name-or-path", "pretrained"), _MODEL),
    **dict.fromkeys(("checkpoint", "student", "target", "target-model", "base-model", "teacher", "config"), _MODEL),
    **dict.fromkeys(("forget-set", "forget-data", "forget-dir", "forget-file", "forget-path"), _FORGET),
    **dict.fromkeys(("retain-set", "retain-data", "retain-dir", "retain-file", "retain-path"), _RETAIN),
    **dict.fromkeys(("dataset", "data", "data-dir", "data-path", "data-file", "train-file", "train-data"), _DATA),
    **dict.fromkeys(("cache-dir", "teacher-cache"), ("cache",)),
    **dict.fromkeys(("method", "algorithm", "trainer", "loss", "objective"), ("recipe", "names")),
    **dict.fromkeys(("num-epochs", "num-train-epochs", "train-epochs"), ("epochs",)),
    **dict.fromkeys(("steps", "num-steps", "train-steps", "max-iters"), ("max_steps",)),
    **dict.fromkeys(("per-device-train-batch-size", "train-batch-size", "bs", "per-device-eval-batch-size"), _BATCH),
    **dict.fromkeys(("force", "force-overwrite", "overwrite-output-dir"), ("overwrite",)),
    **dict.fromkeys(("resume-from-checkpoint", "continue"), ("resume",)),
    **dict.fromkeys(("save-steps", "checkpoint-every"), ("save_every",)),
    **dict.fromkeys(("gpu", "cuda", "cpu", "accelerator"), ("device",)),
    **dict.fromkeys(("random-seed", "data-seed"), ("seed",)),
    **dict.fromkeys(("silent", "no-progress", "q"), ("quiet",)),
    **dict.fromkeys(("v", "debug", "log-level"), ("verbose",)),
    **dict.fromkeys(("n", "simulate"), ("dry_run",)),
    **dict.fromkeys(("template", "prompt-format", "prompt-template"), ("format",)),
    **dict.fromkeys(("system-prompt",), ("system",)),
    **dict.fromkeys(("few-shot", "num-fewshot"), ("shots",)),
    **dict.fromkeys(("task", "tasks"), ("lm_eval",)),
    **dict.fromkeys(("branch", "commit"), ("revision",)),
}


def unknown_command(name: str, commands: Iterable[str]) -> str:
    """The sentence about a command that does not exist."""
    commands = list(commands)
    closest = closest_names(name, commands, COMMAND_SYNONYMS)
    if closest:
        return f"neko-lean has no command {name!r}; did you mean {' or '.join(closest)}?"
    return f"neko-lean has no command {name!r}, only {', '.join(commands)}"


def unknown_option(option: str, command: Any, path: str) -> str:
    """The sentence about an option that a command does not have.

    Args:
        option: the option, as it was given.
        command: the click command, or the group for an option before the command's name.
        path: what was typed to get to the command, such as "neko-lean unlearn".
    """
    start = f"{path} has no option {option}"
    name = option.lstrip("-").lower().replace("_", "-")
    params = {param.name: param for param in command.params}
    for synonym in (name.replace("-", "_"), *PARAMETER_SYNONYMS.get(name, ())):
        param = params.get(synonym)
        if param is not None and param.param_type_name == "argument":
            return f"{start}; {param.metavar or synonym.upper()} is an argument: give its value without {option}."
        if param is not None:
            return f"{start}; did you mean {_longest(param)}?"
    if "commands" in vars(command):
        return f"{start}; options of a command come after its name, see {path} --help."

    long_options = [text[2:] for param in command.params for text in param.opts if text.startswith("--")]
    closest = closest_names(name, long_options)
    if closest:
        return f"{start}; did you mean --{closest[0]}?"
    if "set" in params and (key := _recipe_key(name)) is not None:
        return f"{start}; did you mean --set {key}=VALUE?"
    return f"{start}; see {path} --help."


def _longest(param: Any) -> str:
    """The option's most explicit spelling."""
    return str(max(param.opts, key=len))


def _recipe_key(name: str) -> str | None:
    """The recipe key that an option probably means."""
    from neko_lean.recipe import KEY_SYNONYMS, recipe_keys

    closest = closest_names(name.replace("-", "_"), recipe_keys(), KEY_SYNONYMS)
    return closest[0] if closest else None
