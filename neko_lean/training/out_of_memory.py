"""When the GPU's memory runs out in a step: the same rows in smaller pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neko_lean.checkpoints import RunState
from neko_lean.errors import NekoLeanError
from neko_lean.models import CHUNK_ELEMENTS
from neko_lean.training.batch import Batch

FEW_ROWS = 16  # of the head: smaller chunks than these free next to nothing


def shrink(state: RunState, batch: Batch, vocabulary: int) -> str:
    """Make `state` do with less memory than `batch` took: first the head's chunk, then the micro-batches. Returns what
    it did, in words. Raises NekoLeanError where rows go one at a time already."""
    chunk = min(state.head_chunk or max(1, CHUNK_ELEMENTS // vocabulary), len(batch.row))
    shared = [ids.numel() for ids, rows in zip(batch.micro.input_ids, batch.sizes, strict=True) if rows > 1]
    if (state.head_chunk is None or not shared) and chunk > FEW_ROWS:
        state.head_chunk = chunk // 4
        return f"the head in chunks of {state.head_chunk} positions"
    if shared:
        state.micro_tokens = max(shared) // 2
        return f"micro-batches of at most {state.micro_tokens} positions"
    raise NekoLeanError(
        "the GPU's memory does not hold a single row: make max_length smaller (--set max_length=256), or give "
        "--set offload_state=true, --set offload_activations=true or --set train_last=4."
    )


@contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Turn memory that runs out where nothing can be made smaller into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NekoLeanError(
            "the GPU's memory does not hold the model and Adam's state: give --set offload_state=true, "
            "--set state_bits=4 or --set train_last=4; `neko-lean plan` says what fits."
        ) from error
