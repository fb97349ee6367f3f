"""How the ranks of one command agree. With one rank nothing is set up and nothing is sent.

What they tell each other travels as JSON or as tensors, never as pickles. A NekoLeanError that one rank meets in
`agreed` is raised on all, so that none waits for another that has gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Imported once ranks are connected it would hold on to the connection for good (as the default of its functions'
# arguments), and gloo's threads would abort the process on its way out.
import torch.distributed.nn.functional
from torch import Tensor

from neko_lean.distributed.ranks import is_main_process, local_rank, local_world_size, rank, world_size
from neko_lean.errors import NekoLeanError

T = TypeVar("T")


# A rank may wait for another that works on for hours; one that has died is noticed by its closed connection.
PATIENCE = timedelta(days=7)


_PEER_HAS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in gloo's errors


@contextmanager
def with_process_group() -> Iterator[None]:
    """Connect the ranks while it lasts; within another `joined` it does nothing."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"  # JSON travels over it, beside a GPU too
    # More ranks than GPUs: they run on the CPU, or pick_device refuses them.
    if torch.cuda.is_available() and local_world_size() <= torch.cuda.device_count():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank())
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
        yield
        # Together, or gloo's threads abort a process whose peer has gone first. After an error the connections stay:
        # taking them down waits for ranks that may be waiting themselves.
        all_gather_objects(None)
    except RuntimeError as error:
        if any(words in str(error) for words in _PEER_HAS_GONE):
            raise NekoLeanError("another rank has ended, so this one ends too: what it said is above.") from error
        raise
    dist.destroy_process_group()


def all_gather_objects(value: T) -> list[T]:
    """Every rank's value, in the order of ranks: anything that JSON holds."""
    if world_size() == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(one.numpy().tobytes()) for one in all_gather_tensors(own)]


def all_gather_tensors(own: Tensor) -> list[Tensor]:
    """Every rank's tensor, in the order of ranks; they may differ in how many rows they have, [n, ...]."""
    if world_size() == 1:
        return [own]
    count = torch.tensor([len(own)], device=own.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    longest = max(int(one) for one in counts)
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return [part[: int(n)] for part, n in zip(parts, counts, strict=True)]


def all_gather_with_grad(own: Tensor) -> Tensor:
    """The rows [n, ...] of all ranks, one after another, with gradient in this rank's own."""
    if world_size() == 1:
        return own
    parts = all_gather_tensors(own.detach())
    parts[rank()] = own
    return torch.cat(parts)


def raise_on_any_rank(work: Callable[[], T]) -> list[T]:
    """What `work` returns on every rank, as `gather` gives it. Raises NekoLeanError on all where it does on one."""
    if world_size() == 1:
        return [work()]
    value, error = None, None
    try:
        value = work()
    except NekoLeanError as raised:
        error = str(raised)
    found = all_gather_objects({"value": value, "error": error})
    wrong = next((one["error"] for one in found if one["error"] is not None), None)
    if wrong is not None:
        raise NekoLeanError(wrong)
    return [one["value"] for one in found]  # type: ignore[misc]


def run_on_main_and_broadcast(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank, on all; nothing is done elsewhere."""
    return raise_on_any_rank(lambda: work() if is_main_process() else None)[0]  # type: ignore[return-value]


def require_shared_folder(folder: Path) -> None:
    """Raise NekoLeanError on all ranks where one does not see a folder that the first has made."""

    def look() -> None:
        if not folder.is_dir():
            raise NekoLeanError(
                f"rank {rank()} does not see {folder}: put --out on a file system that all machines share."
            )

    raise_on_any_rank(look)


def merge_items_of_ranks(own: Sequence[T]) -> list[T]:
    """The items again whose `share` each rank gives."""
    parts = all_gather_objects(list(own))
    found: list[Any] = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        found[number :: world_size()] = part
    return found


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is so on any rank."""
    return all_reduce_max(int(flag), device) > 0


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    held = torch.tensor([value], device=device)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of the ranks' tensors, which have one shape."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value
