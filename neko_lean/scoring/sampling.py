"""Sampling of next tokens at temperature 1, from the whole vocabulary.

The random numbers of a row depend only on its key and the step, so neither the other rows of its batch nor the number
of ranks changes what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from neko_lean.models import refuse_non_finite_outputs

BLOCK = 256  # tokens per block; the block is drawn first, then a token in it


def sample_key(seed: int, row_id: str, sample: int) -> str:
    """The key of the random numbers of a row's sample."""
    return f"{seed} {sample} {row_id}"


def random_stream(key: str) -> np.random.Generator:
    """The random numbers that belong to a key; each step of decoding takes the next ones."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def sampled_tokens(logits: Tensor, streams: Sequence[np.random.Generator], what: str) -> list[int]:
    """Draw a token of each row from the softmax of its logits.

    The largest sum of a logit and Gumbel noise is a draw from the softmax. Unlike a draw from the cumulative
    distribution, it changes with the rounding of the logits only if the two largest sums are nearly equal, however
    small the probabilities are. A block of tokens is drawn first, then a token of the block, so that a step takes
    V / BLOCK + BLOCK random numbers of a row instead of V.

    Args:
        logits: [N, V].
        streams: the random numbers of each row, in float64 on the CPU.
        what: what the logits are, for the error message.

    Raises:
        NekoLeanError: a largest logit is NaN or infinite.
    """
    refuse_non_finite_outputs(logits.amax(1), what)
    num_blocks = -(-logits.shape[1] // BLOCK)
    missing = num_blocks * BLOCK - logits.shape[1]
    blocks = pad(logits.float(), (0, missing), value=-torch.inf).unflatten(1, (num_blocks, BLOCK))  # [N, blocks, BLOCK]
    noise = torch.from_numpy(np.stack([stream.gumbel(size=num_blocks + BLOCK) for stream in streams]))
    block_noise, token_noise = noise.split((num_blocks, BLOCK), dim=1)  # [N, blocks], [N, BLOCK]

    block = (blocks.logsumexp(2).cpu() + block_noise).argmax(1)  # [N]
    rows = torch.arange(len(blocks), device=blocks.device)
    in_block = blocks[rows, block.to(blocks.device)].cpu()  # [N, BLOCK]
    tokens: list[int] = (block * BLOCK + (in_block + token_noise).argmax(1)).tolist()
    return tokens
