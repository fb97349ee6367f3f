"""Sequence packing: whether a model can compute several sequences concatenated into one row without mixing them."""

from __future__ import annotations

import torch

from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import CausalLM, logit_tolerance

PROBE_LENGTH = 24  # tokens per sequence


def supports_packing(lm: CausalLM) -> bool:
    """Whether the sequences of a micro-batch can be packed into one row [1, L] with their `position_ids`.

    Requires an attention kernel for variable-length sequences (the flash-attn package or FlexAttention): other kernels
    need an [L, L] mask to separate the sequences, and SDPA does not use its flash kernel with such a mask. It also
    requires that the model passes `keeps_sequences_apart`.
    """
    kernel = str(lm.model.config._attn_implementation)
    return ("flash" in kernel or kernel == "flex_attention") and keeps_sequences_apart(lm)


@torch.no_grad()
def keeps_sequences_apart(lm: CausalLM) -> bool:
    """Whether packing changes nothing: two packed sequences give the hidden states that each gives alone, and those of
    the second do not depend on the first."""
    was_training = lm.model.training
    lm.model.eval()
    first, other_first, second = (
        torch.arange(start, start + PROBE_LENGTH, device=lm.device)[None] % len(lm.head)  # [1, 24]
        for start in (0, PROBE_LENGTH, 2 * PROBE_LENGTH)
    )
    position_ids = torch.arange(PROBE_LENGTH, device=lm.device).repeat(2)[None]  # [1, 48]

    try:
        packed = lm.hidden(torch.cat([first, second], 1), position_ids).float()  # [1, 48, d]
        repacked = lm.hidden(torch.cat([other_first, second], 1), position_ids).float()
        alone = torch.cat([lm.hidden(first), lm.hidden(second)], 1).float()
    except NekoLeanError:  # the model takes no position_ids, or its kernel does not run on this device
        return False
    finally:
        lm.model.train(was_training)

    unchanged = bool((packed - alone).abs().max() <= logit_tolerance(lm.head.dtype) * (1 + alone.abs().max()))
    independent = torch.equal(packed[:, PROBE_LENGTH:], repacked[:, PROBE_LENGTH:])
    return unchanged and independent
