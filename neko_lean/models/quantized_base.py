"""Keep the frozen weights of linear layers in 4 or 8 bits (QLoRA, arXiv 2305.14314), by bitsandbytes' quantisation.

Only the storage is quantised: a layer dequantises its weight when it runs, in the forward pass and again in the
backward pass, so gradients are exact for the dequantised weight. bitsandbytes' own 8-bit layer also rounds activations
to 8 bits, which its gradients ignore.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import CausalLM

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

NF4_BLOCK = 64  # elements that share a scale, as where transformers loads a model in 4 bits


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is quantised.

    Args:
        layer: the layer to replace. A Conv1D, GPT-2's linear layer, stores the transposed weight.
        quantization: "nf4" (4-bit normal floats with a scale per 64 elements) or "int8" (a scale per row).
        device: where the quantised weight is stored.
    """

    def __init__(self, layer: nn.Linear | Conv1D, quantization: str, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.transposed = _is_conv1d(layer)
        weight = layer.weight.detach().to(device)
        weight = weight.T.contiguous() if self.transposed else weight.contiguous()  # [out, in]
        self.out_features, self.in_features = weight.shape
        self.quantization, self.dtype = quantization, weight.dtype
        codes, scales = _quantize(weight, quantization)
        # [out * in / 2, 1] uint8 and [out * in / 64] float32, or [out, in] int8 and [out] float32
        self.weight, self.scales = nn.Parameter(codes, requires_grad=False), nn.Parameter(scales, requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        self.register_parameter("bias", bias)

    def dequantized(self) -> Tensor:
        """The weight [out, in] in the layer's original dtype."""
        from bitsandbytes import functional as bnb

        if self.quantization == "int8":
            weight = bnb.int8_vectorwise_dequant(self.weight, self.scales).to(self.dtype)
        else:
            # bitsandbytes leaves a float64 result uninitialised.
            dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
            # One block a row, for the reason that four_bit.py gives.
            shape = (len(self.scales), NF4_BLOCK)
            weight = torch.ops.bitsandbytes.dequantize_4bit.default(
                self.weight, self.scales, NF4_BLOCK, "nf4", shape, dtype
            ).to(self.dtype)
            weight = weight.view(self.out_features, self.in_features)
        return cast(Tensor, weight)

    def plain(self, device: torch.device) -> nn.Linear | Conv1D:
        """A layer of the original class with the dequantised weight, which is stored on `device`."""
        from transformers.pytorch_utils import Conv1D

        weight = self.dequantized().to(device)  # [out, in]
        with torch.device("meta"):
            layer = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=False)
            )
        layer.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., out] for x [..., in]."""
        out = cast(Tensor, _DequantizedProduct.apply(x, self))  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _DequantizedProduct(torch.autograd.Function):
    """x @ weight.T, which dequantises the weight again in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantized())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(), None


def quantize_base(lm: CausalLM, quantization: str, device: torch.device) -> None:
    """Replace the linear layers of the backbone by quantised ones, and move the model to `device`.

    Layers are quantised one by one, so a model that is loaded in host memory never has its plain weights on the device.
    The embedding, the head, norms and everything else that is not a linear layer keep their dtype.

    Args:
        lm: the model, with plain weights in host memory.
        quantization: "nf4" or "int8", as for QuantizedLinear.
        device: where the model is to run.

    Raises NekoLeanError if there is no linear layer, or its weights cannot be stored so.
    """
    linears = [
        (parent, name, child)
        for parent in lm.backbone.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear or _is_conv1d(child)
    ]
    if not linears:
        raise NekoLeanError(
            f"quantize_base finds no nn.Linear or Conv1D in the layers of {type(lm.model).__name__}; leave it out for "
            f"this model."
        )
    for parent, name, linear in linears:
        if quantization == "nf4" and linear.weight.numel() % NF4_BLOCK:
            continue  # a tiny layer, which would save nothing
        setattr(parent, name, QuantizedLinear(linear, quantization, device))
    if lm.device != device:
        nn.Module.to(lm.model, device)
    else:
        _release_file(lm.model)


def _release_file(model: nn.Module) -> None:
    """Copy a model's plain parameters: one that is mapped from a checkpoint's file keeps all of the file resident."""
    copies: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in copies:
                copies[parameter] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(module, name, copies[parameter])


def dequantize_base(lm: CausalLM, device: torch.device) -> None:
    """Undo `quantize_base`, one layer at a time: the dequantised weights are plain ones on `device`."""
    modules: list[Any] = list(lm.model.modules())
    for parent in modules:
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(parent, name, child.plain(device))
                if hasattr(parent, "fan_in_fan_out"):  # a layer with an adapter, for which PEFT saw an nn.Linear
                    parent.fan_in_fan_out = child.transposed


def quantized_parameters(model: nn.Module) -> set[Tensor]:
    """The codes and scales of all quantised weights of a model."""
    return {
        parameter
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
        for parameter in (module.weight, module.scales)
    }


def _is_conv1d(module: nn.Module) -> TypeGuard[Conv1D]:
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def _quantize(weight: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [out, in]."""
    from bitsandbytes import functional as bnb

    if quantization == "int8":
        # The kernel for GPUs reads float16, whose 11 bits of precision are ample for 8-bit codes.
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return codes, scales
    codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(weight, NF4_BLOCK, "nf4", torch.uint8)
    return codes, scales
