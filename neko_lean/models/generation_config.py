"""A checkpoint's generation_config.json: which tokens end a generation. It is copied into every checkpoint written.

neko-lean ignores the other decoding settings in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from neko_lean.models.causal_lm import CausalLM

GENERATION_CONFIG = "generation_config.json"


def eos_token_ids(lm: CausalLM, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a generation: the tokenizer's EOS token and those of the model's generation config.

    Instruct models end a turn with a token other than the tokenizer's EOS. transformers derives the generation config
    from config.json if a checkpoint has no generation_config.json. Entries outside the vocabulary are left out.
    """
    eos = tokenizer.eos_token_id
    return frozenset([*_configured_ends(lm)[0], *([] if eos is None else [int(eos)])])


def unknown_eos_token_ids(lm: CausalLM) -> list[object]:
    """Entries of the generation config's eos_token_id that are not tokens of the model."""
    return _configured_ends(lm)[1]


def _configured_ends(lm: CausalLM) -> tuple[list[int], list[object]]:
    """The entries of eos_token_id (an id or nested lists of ids) that are tokens of the model, and those that are
    not."""
    config = getattr(lm.model, "generation_config", None)
    pending: list[object] = [getattr(config, "eos_token_id", None)]
    ids: list[int] = []
    unknown: list[object] = []

    while pending:
        entry = pending.pop(0)
        if isinstance(entry, list | tuple):
            pending = [*entry, *pending]
        elif isinstance(entry, int | float) and not isinstance(entry, bool) and entry in range(len(lm.head)):
            ids.append(int(entry))
        elif entry is not None:
            unknown.append(entry)
    return ids, unknown


def stated_eos_token_id(folder: Path) -> Any:
    """The raw `eos_token_id` in a checkpoint's generation_config.json; None if there is no such file or entry.

    Raises:
        NekoLeanError: the file is not a JSON object. transformers silently ignores such a file, and with it the tokens
            that end a generation.
    """
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NekoLeanError(
            f"{file} is not readable JSON ({error}), but it names the tokens that end a generation; download it again."
        ) from error
    if not isinstance(config, dict):
        raise NekoLeanError(f"{file} holds a JSON {type(config).__name__}, expected an object; download it again.")
    return config.get("eos_token_id")


def save_model(model: PreTrainedModel, save: Callable[[], None], folder: Path) -> None:
    """Save a model with its generation config, even one that `save_pretrained` refuses.

    Published generation configs combine settings that save_pretrained rejects, such as a temperature without sampling.
    They do not affect decoding here, and must not cost a finished run its checkpoint.

    Args:
        model: the model.
        save: function that calls `model.save_pretrained(folder)`.
        folder: the folder that `save` writes to.
    """
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    if not isinstance(config, GenerationConfig):
        save()
        return

    # Save with an empty generation config, which is always accepted, then write the real one over it.
    model.generation_config = GenerationConfig()
    try:
        save()
    finally:
        model.generation_config = config
    config.to_json_file(folder / GENERATION_CONFIG, use_diff=True, keys_to_pop=["compile_config"])
