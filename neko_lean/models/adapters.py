"""LoRA adapters (arXiv 2106.09685) through the PEFT library: a low-rank change of each linear layer is trained instead
of its weight.

Adapters are injected into the transformers model itself, so everything that works on the model works on it with
adapters. Their weights are float32 unless the model's are float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from neko_lean.errors import NekoLeanError, first_line
from neko_lean.models.causal_lm import CausalLM

if TYPE_CHECKING:
    from peft import LoraConfig

AUTO_TARGETS = "auto"
_NAME = "default"  # PEFT's name of an adapter, part of its parameters' names
_A, _B, _BASE = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight", ".base_layer."


def add_adapters(lm: CausalLM, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Add adapters to a model and freeze everything else. The model's function is unchanged at first.

    Args:
        lm: the model.
        rank: rank of each adapter.
        alpha: an adapter's product is multiplied by alpha / rank.
        targets: "auto" for every linear layer except the head, or names of layers such as "q_proj,v_proj".
        seed: random seed of the initial values, which do not depend on the device.

    Raises NekoLeanError if no layer has such a name, or PEFT cannot adapt the model.
    """
    from peft import inject_adapter_in_model

    config = _lora_config(rank, alpha, targets)
    # PEFT's modules start on the meta device, for which fake tensors, if they are active, are not needed.
    with _disable_current_modes(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out, which PEFT then sets itself
        try:
            inject_adapter_in_model(config, lm.model, _NAME, low_cpu_mem_usage=True)
        except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
            raise NekoLeanError(
                f"lora_targets {targets!r} cannot be adapted in {type(lm.model).__name__} ({first_line(error)}); name "
                f"linear layers of the model, such as q_proj,v_proj, or use lora_targets = 'auto'."
            ) from error

    # PEFT's initial values, but on the CPU and in float32, so that they do not depend on the device and the dtype.
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(lm.head.dtype, torch.float32)
    for _, layer in _adapted_layers(lm):
        down, up = layer.lora_A[_NAME], layer.lora_B[_NAME]
        values = torch.empty(down.weight.shape, device="cpu")  # [rank, in]
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        down.weight = nn.Parameter(values.to(lm.device, dtype))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, dtype=dtype, device=lm.device))  # [out, rank]


def has_adapters(lm: CausalLM) -> bool:
    """Whether `add_adapters` was called for the model."""
    return any(name.endswith(_A) for name, _ in lm.model.named_parameters())


@torch.no_grad()
def merged_weights(lm: CausalLM, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with its adapters merged, under the names that the model has without adapters.

    Each adapted weight is changed in place, so that no second copy of the model is made: the model must not run again.

    Args:
        lm: the model with adapters; its base is not quantised.
        weights: all weights of that model, by name.
    """
    merged = {name.replace(_BASE, "."): weight for name, weight in weights.items() if not name.endswith((_A, _B))}
    for name, layer in _adapted_layers(lm):
        weight = merged[f"{name}.weight"]
        product = weights[name + _B] @ weights[name + _A]  # [out, in]
        # GPT-2's layers store the transposed weight.
        change = (product.T if layer.fan_in_fan_out else product) * layer.scaling[_NAME]
        weight.add_(change.to(weight.device))
    return merged


def save_adapter(lm: CausalLM, weights: Mapping[str, Tensor], base: str, folder: Path) -> None:
    """Write the adapters as a folder that `PeftModel.from_pretrained` reads.

    Args:
        lm: the model with adapters.
        weights: all weights of that model, or those of its adapters, by name.
        base: hub name or folder of the model without adapters, which the adapter's config names.
        folder: the folder to create.
    """
    folder.mkdir(parents=True)
    adapters = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": weight.detach().cpu().contiguous()
        for name, weight in weights.items()
        if name.endswith((_A, _B))
    }
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = lm.model.peft_config[_NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.fan_in_fan_out = any(layer.fan_in_fan_out for _, layer in _adapted_layers(lm))
    config.save_pretrained(str(folder))


def _adapted_layers(lm: CausalLM) -> Iterator[tuple[str, Any]]:
    """Names and layers to which adapters were added."""
    for name, module in lm.model.named_modules():
        if _NAME in getattr(module, "lora_A", ()):
            yield name, module


def _lora_config(rank: int, alpha: float, targets: str) -> LoraConfig:
    from peft import LoraConfig

    names = "all-linear" if targets == AUTO_TARGETS else [name.strip() for name in targets.split(",")]
    # PEFT's annotation says int, but it divides alpha by the rank.
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=names,
    )
