"""Load a checkpoint: its folder, config, tokenizer and weights."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from neko_lean.errors import NekoLeanError
from neko_lean.models.generation_config import listed_ends
from neko_lean.models.load_checks import check_loaded
from neko_lean.models.positions import (
    embeddable_positions,
    rescaling_length,
    stated_positions,
)
from neko_lean.models.quantized import dequantized, loading_options, quantization_method, refuse_gguf, refuse_quantized
from neko_lean.models.trust import reason, refuse_untrusted
from neko_lean.models.weight_files import refuse_packed, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from neko_lean.models.causal_lm import CausalLM, as_causal_lm

# A commit, branch or tag; it must not lead out of the hub's cache, where it becomes a file's name.
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>(?!.*\.\.)[\w-][\w./-]*))?")


_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def model_folder(model: str | Path, *, config_only: bool = False) -> Path:
    """The local folder of a checkpoint; a hub name ('owner/name', or 'owner/name@revision') is downloaded (with
    `config_only` no more than config.json), anything else is an error."""
    path = Path(model)
    if not path.is_dir():
        path = _from_hub(str(model), path, config_only)
    if not (path / "config.json").is_file():
        refuse_gguf(path)
        raise NekoLeanError(f"{path} holds no config.json: it is not a Hugging Face checkpoint folder.")
    refuse_untrusted(path)
    refuse_quantized(path)
    return path


def _from_hub(text: str, path: Path, config_only: bool) -> Path:
    """The one place that uses the network, and by HF_HUB_OFFLINE=1 it does not either."""
    named = _HUB_NAME.fullmatch(text)
    if path.exists() or named is None:
        raise NekoLeanError(f"{text} is neither a checkpoint folder nor a hub name (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json"] if config_only else _HUB_FILES
        return Path(snapshot_download(named["name"], revision=named["revision"], allow_patterns=files))
    except Exception as error:  # the hub's client raises a dozen types; all of them mean that there is no model
        raise NekoLeanError(f"{text} is no local folder, and the hub did not give it: {reason(error)}") from error


def model_name(model: str | Path) -> str:
    """What to call a model in files: its hub name, or the name of its folder without the way there."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else str(model)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder, with a padding token that the model has a row for.

    Where it has none, another special token is used, EOS first: masks keep padding out of every number.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise NekoLeanError(
            f"{folder} holds no tokenizer that transformers can load: {reason(error)}; get its tokenizer files again."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise NekoLeanError(f"{folder} holds a {type(tokenizer).__name__}, which is not a text tokenizer.")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Without its files transformers makes up an empty tokenizer of the model's family.
        raise NekoLeanError(f"{folder} holds no tokenizer: its files (tokenizer.json and the like) are missing.")
    known = _vocab_size(folder)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = _padding_token(tokenizer, folder, known)
    return tokenizer


def _vocab_size(folder: Path) -> int:
    """The model's vocabulary size according to config.json; unlimited without one."""
    if not (folder / "config.json").is_file():
        return sys.maxsize
    size = getattr(load_config(folder).get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else sys.maxsize


def _padding_token(tokenizer: PreTrainedTokenizerBase, folder: Path, known: int) -> str:
    """A special token below `known` to pad with."""
    for token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, *tokenizer.all_special_tokens):
        if token is not None and cast(int, tokenizer.convert_tokens_to_ids(token)) < known:
            return str(token)
    raise NekoLeanError(
        f"the tokenizer in {folder} has neither a padding nor an EOS token that the model knows: give it one."
    )


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """Load a checkpoint's weights from safetensors as `dtype` onto `device`.

    Raises NekoLeanError where the files do not hold exactly the tensors of the model that config.json describes, or a
    tensor holds NaN or infinite values; see `loading.check_loaded`.
    """
    from transformers import AutoModelForCausalLM

    listed_ends(folder)  # transformers passes over a generation config that it cannot read
    stored, method = stored_tensors(folder), quantization_method(folder)
    if method is None:
        refuse_packed(stored)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded names them
            **loading_options(method, device),
        )
    except Exception as error:  # transformers raises a dozen types
        if "conversion of the weights" in str(error):
            raise NekoLeanError(
                f"the tensors in {folder} do not fit together to those of its config.json, as with an expert that is "
                f"missing: get the checkpoint again."
            ) from error
        raise NekoLeanError(f"{folder} cannot be loaded as a causal language model: {reason(error)}") from error
    model, info = loaded
    model = dequantized(model, method, dtype)
    check_loaded(model, folder, stored, info, packed=method is not None)
    return as_causal_lm(model.to(device))  # type: ignore[arg-type]


def load_config(folder: Path) -> PreTrainedConfig:
    """What config.json says, as transformers' own class for that kind of model."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a dozen types, transformers' validation errors among them
        raise NekoLeanError(f"{folder / 'config.json'} is no model that transformers has: {reason(error)}") from error
    if hasattr(config, "quantization_config"):  # it describes the weights in the folder; those of a new model are plain
        del config.quantization_config
    return config


def new_model(config_folder: Path, dtype: torch.dtype, device: torch.device, seed: int) -> CausalLM:
    """A model with random weights from config.json alone, the same for the same seed; with the end tokens of the
    folder's generation_config.json."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = load_config(config_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if listed_ends(config_folder) is not None:
        model.generation_config = GenerationConfig.from_pretrained(config_folder, local_files_only=True)
    return as_causal_lm(model.to(device=device, dtype=dtype))


def usable_length(folder: Path, max_length: int) -> int:
    """`position_limit` of the checkpoint in `folder`, from its config alone."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    limits = [limit for limit in (stated_positions(config), rescaling_length(config)) if limit is not None]
    if max_length <= min(limits, default=max_length):
        return max_length
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return min(max_length, embeddable_positions(model, config) or max_length)
