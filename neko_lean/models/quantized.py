"""Quantised checkpoints: dequantised if transformers can, refused before any weight is read if it cannot.

Training and saving need plain weights, so every command decides this from config.json.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from neko_lean.errors import NekoLeanError
from neko_lean.models.four_bit import dequantize_4bit
from neko_lean.models.trust import nested_values, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Config keys that declare quantisation: those of transformers, compressed-tensors and MLX.
KEYS = ("quantization_config", "compression_config", "quantization")

# Methods that transformers can dequantise, and the package that each requires.
DEQUANTIZABLE = {"bitsandbytes": "accelerate", "fp8": "accelerate", "mxfp4": None}


def quantization_method(folder: Path) -> str | None:
    """The quantisation method that a checkpoint's config.json declares, such as 'gptq'; None if it declares none."""
    for key, value in nested_values(read_config(folder)):
        if key in KEYS and isinstance(value, dict) and value:
            loads_bits = value.get("load_in_4bit") or value.get("load_in_8bit")
            return str(value.get("quant_method") or ("bitsandbytes" if loads_bits else key))
    return None


def refuse_quantized(folder: Path) -> None:
    """Raise NekoLeanError, naming the method, if a checkpoint is quantised and cannot be dequantised here."""
    method = quantization_method(folder)
    if method is None:
        return
    package = DEQUANTIZABLE.get(method)
    if method in DEQUANTIZABLE and (package is None or importlib.util.find_spec(package) is not None):
        return
    install = f", or pip install {package} to dequantise it" if package else ""
    raise NekoLeanError(
        f"{folder / 'config.json'} says that the weights are quantised ({method}), but neko-lean needs plain weights; "
        f"use the checkpoint in bfloat16, float16 or float32{install}; if the weights are plain, remove that entry."
    )


def refuse_gguf(folder: Path) -> None:
    """Raise NekoLeanError if a folder holds GGUF files, which transformers does not load as a checkpoint."""
    if any(folder.glob("*.gguf")):
        raise NekoLeanError(
            f"{folder} holds its weights as GGUF, which is quantised, but neko-lean needs plain weights; use the "
            f"original checkpoint in safetensors."
        )


def loading_kwargs(method: str | None, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that a quantisation method requires."""
    if method is None:
        return {}
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if method == "fp8":
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    return {"device_map": {"": str(device)}}


def dequantize(model: PreTrainedModel, method: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model with plain weights of `dtype`, which can be saved like any other; unchanged if `method` is None.

    Raises:
        NekoLeanError: a weight is still quantised.
    """
    if method is None:
        return model
    if getattr(model, "is_quantized", False):
        # First, because transformers uses bitsandbytes' own function, and leaves plain weights as they are.
        for module in model.modules():
            weight: Any = getattr(module, "weight", None)
            if (state := getattr(weight, "quant_state", None)) is not None:
                module.weight = nn.Parameter(dequantize_4bit(weight.data, state), requires_grad=False)
        model = model.dequantize(dtype=dtype)
    # Dequantised weights, and weights that were not quantised, can be float32.
    nn.Module.to(model, dtype)  # in place; transformers' own `to` is annotated as taking no dtype
    # Otherwise saving would give the plain weights the names of the quantised ones.
    model.__dict__["_weight_conversions"] = None

    remaining = next((name for name, parameter in model.named_parameters() if parameter.dtype != dtype), None)
    if remaining is not None or getattr(model.config, "quantization_config", None) is not None:
        example = f" (for example {remaining})" if remaining else ""
        raise NekoLeanError(
            f"transformers did not dequantise the {method} weights of this {type(model).__name__}{example}; use the "
            f"checkpoint in bfloat16, float16 or float32."
        )
    return model
