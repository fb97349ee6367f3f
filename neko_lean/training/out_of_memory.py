"""CUDA out of memory: process the same examples in smaller pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neko_lean.checkpoints import RunState
from neko_lean.errors import NekoLeanError
from neko_lean.models import CHUNK_ELEMENTS
from neko_lean.training.batch import Batch

MIN_HEAD_ROWS = 16  # chunks of the head with fewer rows than this free almost no memory


def shrink(state: RunState, batch: Batch, vocab_size: int) -> str:
    """Change `state` so that the next attempt needs less memory than `batch` did.

    The first time, the head's chunks become smaller; after that the micro-batches.

    Args:
        state: state of the run; `head_chunk` or `micro_tokens` is lowered.
        batch: the batch for which memory ran out.
        vocab_size: rows of the head.

    Returns a description of the change. Raises NekoLeanError if each micro-batch holds a single example already.
    """
    chunk = min(state.head_chunk or max(1, CHUNK_ELEMENTS // vocab_size), len(batch.row))
    divisible = [ids.numel() for ids, rows in zip(batch.micro.input_ids, batch.sizes, strict=True) if rows > 1]
    if (state.head_chunk is None or not divisible) and chunk > MIN_HEAD_ROWS:
        state.head_chunk = chunk // 4
        return f"the head in chunks of {state.head_chunk} positions"
    if divisible:
        state.micro_tokens = max(divisible) // 2
        return f"micro-batches of at most {state.micro_tokens} positions"
    raise NekoLeanError(
        "CUDA out of memory with a single example per micro-batch; lower max_length (--set max_length=256), or use "
        "--set offload_state=true, --set offload_activations=true or --set train_last=4."
    )


@contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Turn CUDA out of memory, where nothing can be made smaller, into a NekoLeanError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NekoLeanError(
            "CUDA out of memory: the GPU does not hold the model and Adam's state; use --set offload_state=true, "
            "--set state_bits=4 or --set train_last=4, and see `neko-lean plan` for what fits."
        ) from error
