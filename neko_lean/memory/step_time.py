"""A rough time of a step: its floating-point operations, divided by what a GPU is assumed to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from neko_lean.models import CausalLM, QuantizedLinear, has_adapters
from neko_lean.recipe import Recipe

# Assumed share of a GPU's dense bfloat16 peak that a step reaches.
ASSUMED_SHARE = 0.4


@dataclass(frozen=True)
class Gpu:
    """A graphics card, from the vendor's data sheet."""

    name: str
    memory: int
    """Bytes."""
    flops: float
    """Dense bfloat16 operations per second, accumulated in float32."""


GPUS = tuple(
    Gpu(name, gibibytes * 2**30, teraflops * 1e12)
    for name, gibibytes, teraflops in (
        ("RTX 3090", 24, 71),
        ("RTX 4090", 24, 165),
        ("RTX A6000", 48, 155),
        ("L4", 24, 121),
        ("L40S", 48, 362),
        ("A100 40GB", 40, 312),
        ("A100 80GB", 80, 312),
        ("H100", 80, 989),
        ("H100 PCIe", 80, 756),
        ("H200", 140, 989),
    )
)


@dataclass(frozen=True)
class MatmulParameters:
    """Numbers of parameters that hidden states are multiplied with: all but a lookup in the embedding."""

    total: int
    passed: int
    """Parameters through which a gradient passes. Layers below the first trained one run forward only."""

    trained: int
    """Parameters that have a gradient."""

    @classmethod
    def of(cls, lm: CausalLM, repeated: Sequence[nn.Module] = ()) -> MatmulParameters:
        """Count those of a model, and again those of layers that it uses repeatedly. A tied embedding counts, as the
        head."""
        lookup = None if lm.embedding is lm.head else lm.embedding
        parts = [lm.model, *repeated]
        counted = [p for part in parts for p in part.parameters() if p is not lookup and p.is_floating_point()]
        quantized = [module for part in parts for module in part.modules() if isinstance(module, QuantizedLinear)]
        total = sum(p.numel() for p in counted) + sum(layer.in_features * layer.out_features for layer in quantized)
        trained = sum(p.numel() for p in counted if p.requires_grad)
        return cls(total, total if has_adapters(lm) else trained, trained)


def step_flops(parameters: MatmulParameters, tokens: int, recipe: Recipe) -> int:
    """Floating-point operations of a step.

    Each token takes 2 for each parameter in the forward pass, 2 for each one that its gradient passes through and 2 for
    each trained one in the backward pass, and 2 for what is computed again there. Attention scores are not counted, and
    all experts are.
    """
    again = 0 if recipe.backward == "plain" else 2
    return tokens * (2 * parameters.total + (2 + again) * parameters.passed + 2 * parameters.trained)


def step_seconds(flops: int, gpu: Gpu) -> float:
    """Seconds of a step at the assumed share of the GPU's peak, without the update and without transfers."""
    return flops / (ASSUMED_SHARE * gpu.flops)
