"""A checkpoint's generation_config.json: it says which tokens end a generation, and goes into every checkpoint written.

Nothing else in it changes how neko-lean decodes.
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

    Instruct models end a turn with another token than the tokenizer's. transformers derives the generation config from
    config.json where a checkpoint has no generation_config.json. Entries that are no tokens of the model are left out.
    """
    eos = tokenizer.eos_token_id
    return frozenset([*_listed(lm)[0], *([] if eos is None else [int(eos)])])


def unknown_eos_token_ids(lm: CausalLM) -> list[object]:
    """Entries of the generation config's eos_token_id that are no tokens of the model."""
    return _listed(lm)[1]


def _listed(lm: CausalLM) -> tuple[list[int], list[object]]:
    """The entries of eos_token_id, an id or a list of ids, that are tokens of the model, and those that are not."""
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
    """What a checkpoint's generation_config.json says of `eos_token_id`, as it stands there; None without such a file.

    Raises NekoLeanError where the file is not a JSON object. transformers passes over such a file without a word, and
    with it over the tokens that end a generation.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NekoLeanError(
            f"{path} is not readable JSON ({error}), but names the tokens that end a generation: get the file again."
        ) from error
    if not isinstance(found, dict):
        raise NekoLeanError(f"{path} holds a JSON {type(found).__name__} instead of an object: get the file again.")
    return found.get("eos_token_id")


def save_model(model: PreTrainedModel, save: Callable[[], None], folder: Path) -> None:
    """Call `save`, which is to run `model.save_pretrained` into `folder`, with any generation config.

    Published generation configs combine settings that save_pretrained refuses, such as a temperature without sampling.
    They change no decoding here, and must not cost a finished run its checkpoint.
    """
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    if not isinstance(config, GenerationConfig):
        save()
        return
    model.generation_config = GenerationConfig()
    try:
        save()
    finally:
        model.generation_config = config
    config.to_json_file(folder / GENERATION_CONFIG, use_diff=True, keys_to_pop=["compile_config"])
