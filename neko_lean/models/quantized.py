"""Quantised checkpoints: dequantised where transformers can, refused before a weight is read where it cannot.

Only plain weights can be trained and saved here, so that this is decided from config.json, by every command.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neko_lean.errors import NekoLeanError
from neko_lean.models.trust import nested_values, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# How config.json calls what was done to the weights: transformers' key, and those of compressed-tensors and MLX.
KEYS = ("quantization_config", "compression_config", "quantization")


# What transformers can turn back into plain weights, and the package that it needs for that.
DEQUANTIZED = {"bitsandbytes": "accelerate", "fp8": "accelerate", "mxfp4": None}


def quantization_method(folder: Path) -> str | None:
    """How a checkpoint is quantised by its config.json, such as 'gptq'; None where it is not."""
    for key, value in nested_values(read_config(folder)):
        if key in KEYS and isinstance(value, dict) and value:
            loads_bits = value.get("load_in_4bit") or value.get("load_in_8bit")
            return str(value.get("quant_method") or ("bitsandbytes" if loads_bits else key))
    return None


def refuse_quantized(folder: Path) -> None:
    """Raise NekoLeanError for a quantised checkpoint that cannot be dequantised here, naming the method."""
    method = quantization_method(folder)
    if method is None:
        return
    needs = DEQUANTIZED.get(method)
    if method in DEQUANTIZED and (needs is None or importlib.util.find_spec(needs) is not None):
        return
    install = f", or pip install {needs} to have it dequantised" if needs else ""
    raise NekoLeanError(
        f"{folder / 'config.json'} says that the weights are quantised ({method}), and neko-lean needs plain ones: "
        f"give the checkpoint in bfloat16, float16 or float32{install}; if it is, remove that from config.json."
    )


def refuse_gguf(folder: Path) -> None:
    """Raise NekoLeanError for a folder with GGUF files, which transformers does not read as a checkpoint."""
    if any(folder.glob("*.gguf")):
        raise NekoLeanError(
            f"{folder} holds its weights as GGUF, which is quantised: neko-lean trains plain weights, so give the "
            f"original checkpoint in safetensors."
        )


def loading_options(method: str | None, device: torch.device) -> dict[str, Any]:
    """What transformers' from_pretrained needs in addition to load plain weights."""
    if method is None:
        return {}
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if method == "fp8":
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    return {"device_map": {"": str(device)}}


def dequantized(model: PreTrainedModel, method: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model with plain weights of `dtype`, which is saved as any other; itself where it was not quantised.

    Raises NekoLeanError where something quantised is left.
    """
    if method is None:
        return model
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype=dtype)
    model = model.to(dtype)  # type: ignore[arg-type]  # scales, and what was not quantised, can leave it in float32
    # Saving would call the plain weights by the names of the quantised ones.
    model.__dict__["_weight_conversions"] = None
    left = next((name for name, p in model.named_parameters() if p.dtype != dtype), None)
    if left is not None or getattr(model.config, "quantization_config", None) is not None:
        raise NekoLeanError(
            f"the {method} weights of this {type(model).__name__} were not dequantised{f' ({left})' if left else ''}: "
            f"give the checkpoint in bfloat16, float16 or float32."
        )
    return model
