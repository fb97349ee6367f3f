"""Collective operations: exchange values and errors between the ranks of one command.

Values travel as JSON or as tensors, never as pickles. With a single rank every operation returns without communicating.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

# Import this before the process group exists. Imported later, its functions' default arguments keep a reference to the
# process group, and gloo's threads abort the process when it exits.
import torch.distributed.nn.functional
from torch import Tensor

from neko_lean.distributed.ranks import is_main_process, local_rank, local_world_size, rank, world_size
from neko_lean.errors import NekoLeanError

T = TypeVar("T")

# A rank may wait for hours while another one works. A rank that dies is detected by its closed connection instead.
TIMEOUT = timedelta(days=7)

_PEER_EXITED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in gloo's error messages


@contextmanager
def with_process_group() -> Iterator[None]:
    """Context manager (and decorator) that connects the ranks of a torchrun command.

    The group consists of all ranks of the command. It uses gloo for CPU tensors, and NCCL for CUDA tensors if every
    rank of this machine has a GPU. Nothing happens with a single rank, or if the ranks are already connected.

    Raises:
        NekoLeanError: If the connection to another rank is lost.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return

    backend = "gloo"
    # With more ranks than GPUs the ranks run on the CPU; pick_device refuses any other device.
    if torch.cuda.is_available() and local_world_size() <= torch.cuda.device_count():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank())

    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        yield
        # Wait for all ranks: gloo's threads abort a process if a peer disconnects first.
        all_gather_objects(None)
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in _PEER_EXITED):
            raise NekoLeanError(
                "another rank has exited, so this rank exits too; see that rank's error above."
            ) from error
        raise

    # Not in a finally clause: after an error, destroying the group could wait forever for ranks that wait themselves.
    dist.destroy_process_group()


def all_gather_objects(value: T) -> list[T]:
    """Gather a JSON-serializable value from every rank.

    Returns:
        The values of all ranks, in rank order.
    """
    if world_size() == 1:
        return [value]

    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(received.numpy().tobytes()) for received in all_gather_tensors(payload)]


def all_gather_tensors(tensor: Tensor) -> list[Tensor]:
    """Gather a tensor from every rank.

    Args:
        tensor: This rank's tensor, [n, ...]. `n` may differ between ranks; dtype and the other dimensions may not.

    Returns:
        The tensors of all ranks, in rank order.
    """
    if world_size() == 1:
        return [tensor]

    # Exchange the lengths.
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)

    # all_gather needs equal shapes, so pad to the longest tensor.
    padded = tensor.new_zeros(max(int(length) for length in lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)

    return [part[: int(length)] for part, length in zip(gathered, lengths, strict=True)]


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, [n, ...] each, along the first dimension.

    Gradients flow to this rank's own part only.
    """
    if world_size() == 1:
        return tensor

    parts = all_gather_tensors(tensor.detach())
    parts[rank()] = tensor
    return torch.cat(parts)


def raise_on_any_rank(work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank and gather its JSON-serializable results.

    If one rank fails, all ranks fail, so that none waits for a rank that has exited.

    Returns:
        The results of all ranks, in rank order.

    Raises:
        NekoLeanError: On all ranks, if `work` raises NekoLeanError on at least one.
    """
    if world_size() == 1:
        return [work()]

    outcome: dict[str, Any] = {"value": None, "error": None}
    try:
        outcome["value"] = work()
    except NekoLeanError as error:
        outcome["error"] = str(error)

    outcomes = all_gather_objects(outcome)
    errors = [gathered["error"] for gathered in outcomes if gathered["error"] is not None]
    if errors:
        raise NekoLeanError(errors[0])
    return [gathered["value"] for gathered in outcomes]


def run_on_main_and_broadcast(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only and return its JSON-serializable result on all ranks.

    Raises:
        NekoLeanError: On all ranks, if `work` raises NekoLeanError on rank 0.
    """
    results = raise_on_any_rank(lambda: work() if is_main_process() else None)
    return cast("T", results[0])


def require_shared_folder(folder: Path) -> None:
    """Check that every rank sees a folder that rank 0 has created.

    Raises:
        NekoLeanError: On all ranks, if at least one rank does not see the folder.
    """

    def check() -> None:
        if not folder.is_dir():
            raise NekoLeanError(
                f"rank {rank()} does not see {folder}; put --out on a file system that all machines share."
            )

    raise_on_any_rank(check)


def merge_items_of_ranks(own: Sequence[T]) -> list[T]:
    """Gather the ranks' results in the order of the original items: the inverse of `items_of_rank`.

    Args:
        own: One JSON-serializable result per item of this rank.
    """
    parts = all_gather_objects(list(own))
    merged: list[Any] = [None] * sum(map(len, parts))
    for rank_number, part in enumerate(parts):
        merged[rank_number :: world_size()] = part
    return merged


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on at least one rank. `device` is where the ranks exchange it."""
    return all_reduce_max(int(flag), device) > 0


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest `value` of all ranks. `device` is where the ranks exchange it."""
    if world_size() == 1:
        return value

    reduced = torch.tensor([value], device=device)
    dist.all_reduce(reduced, dist.ReduceOp.MAX)
    return int(reduced)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, which must have the same shape. Overwrites and returns `tensor`."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
