"""Load a checkpoint: its folder, config, tokenizer and weights."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn

from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import CausalLM, as_causal_lm
from neko_lean.models.generation_config import stated_eos_token_id
from neko_lean.models.load_checks import check_loaded
from neko_lean.models.positions import embeddable_positions, rescaling_length, stated_positions
from neko_lean.models.quantized import dequantize, loading_kwargs, quantization_method, refuse_gguf, refuse_quantized
from neko_lean.models.trust import reason, refuse_untrusted
from neko_lean.models.weight_files import refuse_undeclared_quantization, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# A checkpoint folder or a hub name. The functions of the Python API also accept a loaded model, see `checkpoint_of`.
Model: TypeAlias = "str | Path | PreTrainedModel"

# 'owner/name' or 'owner/name@revision'. A revision must not contain '..': it becomes a file name in the hub's cache.
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>(?!.*\.\.)[\w-][\w./-]*))?")

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def model_folder(model: Model, *, config_only: bool = False) -> Path:
    """The local folder of a checkpoint, after checking that neko-lean can use it.

    Args:
        model: a folder, or a hub name ('owner/name' or 'owner/name@revision'), which is downloaded.
        config_only: download config.json only.

    Raises:
        NekoLeanError: there is no such checkpoint, it would run code, or it is quantised and cannot be dequantised.
    """
    path = _as_path(model)
    if not path.is_dir():
        path = _download(str(model), config_only)
    _refuse_adapter(path)
    if not (path / "config.json").is_file():
        refuse_gguf(path)
        raise NekoLeanError(f"{path} has no config.json; pass the folder of a Hugging Face checkpoint.")
    refuse_untrusted(path)
    refuse_quantized(path)
    return path


def _refuse_adapter(path: Path) -> None:
    """Raise NekoLeanError for a PEFT adapter. If it lies next to a model, transformers loads the model that the adapter
    names instead of that one."""
    if not (path / "adapter_config.json").is_file():
        return
    if (path / "config.json").is_file():
        raise NekoLeanError(
            f"{path} holds both a model and a PEFT adapter, and transformers would load the model that the adapter "
            f"names; move adapter_config.json out of that folder."
        )
    raise NekoLeanError(
        f"{path} holds a PEFT adapter without its model, but neko-lean needs a whole checkpoint; merge the adapter "
        f"with PEFT's merge_and_unload and save that, or pass the output folder that holds this one."
    )


def _as_path(model: Model) -> Path:
    if not isinstance(model, (str, Path)):
        raise NekoLeanError(f"model has type {type(model).__name__}; expected a checkpoint folder or a hub name.")
    return Path(model)


def _download(name: str, config_only: bool) -> Path:
    """Download a checkpoint into the hub's cache. This is the only use of the network; HF_HUB_OFFLINE=1 disables it."""
    match = _HUB_NAME.fullmatch(name)
    if Path(name).exists() or match is None:
        raise NekoLeanError(f"{name} is neither a checkpoint folder nor a hub name (owner/name); check the path.")
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json"] if config_only else _HUB_FILES
        return Path(snapshot_download(match["name"], revision=match["revision"], allow_patterns=files))
    except Exception as error:  # the hub's client raises many types
        raise NekoLeanError(
            f"{name} is not a local folder, and downloading it from the Hugging Face Hub failed ({reason(error)}); "
            f"check the name and the connection, or pass a local folder."
        ) from error


def model_name(model: Model) -> str:
    """The name of a model for files: its hub name, or the name of its folder without the path."""
    path = _as_path(model)
    return path.resolve().name if path.is_dir() else str(model)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder, with a padding token inside the model's vocabulary.

    If its own padding token is missing or outside the vocabulary, another special token is used, EOS first. Masks
    exclude padding from every number.

    Raises:
        NekoLeanError: there is no usable tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types
        raise NekoLeanError(
            f"{folder} holds no tokenizer that transformers can load ({reason(error)}); download its tokenizer files "
            f"again."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise NekoLeanError(
            f"{folder} holds a {type(tokenizer).__name__}, expected a text tokenizer; use a text-only checkpoint."
        )
    # If its files are missing, transformers creates an empty tokenizer of the model's family.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise NekoLeanError(
            f"{folder} holds no tokenizer; add its files, such as tokenizer.json and tokenizer_config.json."
        )

    vocab_size = _vocab_size(folder)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = _padding_token(tokenizer, folder, vocab_size)
    return tokenizer


def _vocab_size(folder: Path) -> int:
    """The model's vocabulary size according to config.json; sys.maxsize if it is not stated."""
    if not (folder / "config.json").is_file():
        return sys.maxsize
    size = getattr(load_config(folder).get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else sys.maxsize


def _padding_token(tokenizer: PreTrainedTokenizerBase, folder: Path, vocab_size: int) -> str:
    """A special token inside the vocabulary."""
    for token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, *tokenizer.all_special_tokens):
        if token is not None and cast(int, tokenizer.convert_tokens_to_ids(token)) < vocab_size:
            return str(token)
    raise NekoLeanError(
        f"the tokenizer in {folder} has no special token inside the model's vocabulary to pad with; set its pad_token."
    )


def load_config(folder: Path) -> PreTrainedConfig:
    """Load config.json as transformers' config class, without its quantization_config.

    Raises:
        NekoLeanError: transformers does not know such a model, or rejects its values.
    """
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # many types, including transformers' validation errors
        raise NekoLeanError(
            f"{folder / 'config.json'} describes no model that transformers can build ({reason(error)}); download it "
            f"again, or upgrade transformers."
        ) from error
    # It describes the weights in the folder; the weights of a new model are plain.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """Load a checkpoint from safetensors.

    Args:
        folder: the checkpoint folder, as `model_folder` returns it.
        dtype: dtype of the weights.
        device: device of the weights.

    Raises:
        NekoLeanError: the files do not hold exactly the tensors that config.json describes, a tensor holds NaN or
            infinite values (see `check_loaded`), or the model is not supported (see `as_causal_lm`).
    """
    # Before loading: transformers silently ignores an unreadable generation config and undeclared quantisation.
    stated_eos_token_id(folder)
    stored, method = stored_tensors(folder), quantization_method(folder)
    if method is None:
        refuse_undeclared_quantization(stored)

    loaded, info = _load_with_transformers(folder, dtype, **loading_kwargs(method, device))
    model = dequantize(loaded, method, dtype)
    check_loaded(model, folder, stored, info, dequantized=method is not None)
    nn.Module.to(model, device)  # in place; transformers' own `to` is annotated as taking no device
    return as_causal_lm(model)


def _load_with_transformers(folder: Path, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
    """The model that transformers loads, and its loading info."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded names the tensors
            **kwargs,
        )
    except Exception as error:  # transformers raises many types
        if "conversion of the weights" in str(error):
            raise NekoLeanError(
                f"the tensors in {folder} cannot be combined into the weights that its config.json describes, as if "
                f"an expert were missing; download the checkpoint again."
            ) from error
        raise NekoLeanError(
            f"{folder} cannot be loaded as a causal language model ({reason(error)}); check that its config.json is "
            f"complete and that the packages it needs are installed."
        ) from error
    return cast("tuple[Any, Any]", loaded)


def new_model(config_folder: Path, dtype: torch.dtype, device: torch.device, seed: int) -> CausalLM:
    """Create a model with random weights from config.json, and the end tokens of any generation_config.json.

    Args:
        config_folder: folder with config.json.
        dtype: dtype of the weights.
        device: device of the weights.
        seed: seed of the initialisation; the same seed gives the same weights.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = load_config(config_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if stated_eos_token_id(config_folder) is not None:
        model.generation_config = GenerationConfig.from_pretrained(config_folder, local_files_only=True)
    return as_causal_lm(model.to(device=device, dtype=dtype))


def usable_length(folder: Path, max_length: int) -> int:
    """`position_limit` of the checkpoint in `folder`, without loading its weights."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    limits = [limit for limit in (stated_positions(config), rescaling_length(config)) if limit is not None]
    if max_length <= min(limits, default=max_length):
        return max_length
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return min(max_length, embeddable_positions(model, config) or max_length)
