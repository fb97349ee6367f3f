"""The quantization attack: the weights in 8 and 4 bits.

Zhang et al. 2025 (arXiv 2410.16454) found that this undoes many unlearning methods.
"""

from __future__ import annotations

import torch

from neko_lean.models import CausalLM, dequantize_4bit
from neko_lean.scoring.attacks.answers import baseline_point, point
from neko_lean.scoring.attacks.registry import AttackTarget, Curve, attack

BITS = (8, 4)
BLOCK = 64  # weights that share a scale in 4 bits


@attack(
    "quantize",
    title="Quantization",
    x_key="bits",
    x_label="bits per weight",
    x_is_category=True,
    reloads_model=True,
)
def quantize(target: AttackTarget) -> Curve:
    """Quantize the model, loaded anew for each number of bits."""
    curve: Curve = []
    for bits in BITS:
        lm = target.load(target.folder)
        if not curve:
            curve.append({"bits": 8 * lm.head.element_size(), **baseline_point(target.examples, target.baseline)})
        round_trip(lm, bits)
        curve.append({"bits": bits, **point(target.examples, target.generate(lm, target.examples, f"{bits} bits"))})
        del lm  # before the next one is loaded
    return curve


@torch.no_grad()
def round_trip(lm: CausalLM, bits: int) -> None:
    """Quantize and dequantize the weights of every linear layer except the head, in place.

    8 bits: one scale per row of the weight, absmax / 127 (LLM.int8, arXiv 2208.07339, without its outliers). 4 bits:
    bitsandbytes' NF4 in blocks of 64 (arXiv 2305.14314). As in both, matrix products stay in the model's precision.
    """
    from bitsandbytes.functional import quantize_4bit

    head = lm.model.get_output_embeddings()
    for module in lm.model.modules():
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        weight = module.weight  # [out, in]
        if bits == 8:
            scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127  # [out, 1]
            weight.copy_((weight.float() / scale).round() * scale)
        else:
            packed, state = quantize_4bit(weight.detach().contiguous(), blocksize=BLOCK, quant_type="nf4")
            weight.copy_(dequantize_4bit(packed, state))
