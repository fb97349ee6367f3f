"""Devices, dtypes, seeds, and the memory that is in use."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from neko_lean.distributed import local_rank, local_world_size, world_size
from neko_lean.errors import NekoLeanError
from neko_lean.terminal import log_line

if TYPE_CHECKING:
    pass
import ctypes
import gc
import resource
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


LARGEST_SEED = 2**63 - 1  # what torch takes, with room for the steps and ranks that are added to a seed


_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,9})?")


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; by default CUDA where there is one, else the CPU. Under torchrun a rank's own GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if _DEVICE.fullmatch(name) is None:
        raise NekoLeanError(f"device {name!r} is not supported: use cpu, cuda or cuda:N.")
    if world_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise NekoLeanError(f"under torchrun each rank has a GPU of its own: give --device cuda, not {name}.")
        _refuse_more_ranks_than_gpus()
        name = f"cuda:{local_rank()}"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise NekoLeanError(f"device {name!r} was asked for, but PyTorch sees no GPU here: use --device cpu.")
        count = torch.cuda.device_count()
        if int(name.removeprefix("cuda").removeprefix(":") or 0) >= count:
            last = f"the last GPU that PyTorch sees here is cuda:{count - 1}"
            raise NekoLeanError(f"device {name!r} does not exist: {last}.")
    return torch.device(name)


def check_seed(seed: int) -> int:
    """The seed, if random number generators take it. Raises NekoLeanError for one below 0 or above 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise NekoLeanError(f"seed must be an integer from 0 to {LARGEST_SEED}, got {_brief(seed)}.")
    return seed


def _brief(value: object) -> str:
    """A value for a message: Python refuses to write integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "one of more than 30 digits"
    return repr(value)


def _refuse_more_ranks_than_gpus() -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < local_world_size():
        raise NekoLeanError(
            f"torchrun started {local_world_size()} processes on this machine, which has {gpus} GPU{'s' * (gpus > 1)}, "
            f"and each needs a GPU: use --nproc-per-node {gpus}, or --device cpu."
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; a CPU without that takes tens of times as long."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_emulated_bfloat16(dtype: str, device: torch.device, quiet: bool) -> None:
    """Say that training in bfloat16 will be slow where the device only emulates it."""
    if dtype == "bfloat16" and not has_bfloat16(device):
        log_line("warning: this CPU emulates bfloat16, so steps will be slow: --set dtype=float32 is faster.", quiet)


def pick_dtype(name: str) -> torch.dtype:
    """'bfloat16' or 'float32' as a torch.dtype."""
    if name not in DTYPES:
        raise NekoLeanError(f"dtype {name!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def reset_peak_memory(device: torch.device) -> None:
    """Start counting the peak afresh: the GPU's, and the process's where the system lets it be reset (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # 5 is the peak alone, see proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5")


def trim_memory() -> None:
    """Give back what the allocator keeps of freed blocks, so that what is measured from here on is growth and not the
    reuse of leftovers. Only glibc can be asked."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Bytes of this process in memory now, mapped files among them; its peak so far where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory(torch.device("cpu"))["process"]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peaks in bytes since `reset_peak`: `process` (resident set), and on a GPU `allocated` and `reserved` by
    PyTorch."""
    peaks = {"process": _process_peak()}
    if device.type == "cuda":
        peaks["allocated"] = torch.cuda.max_memory_allocated(device)
        peaks["reserved"] = torch.cuda.max_memory_reserved(device)
    return peaks


def _process_peak() -> int:
    # Not ru_maxrss where there is another way: no reset reaches it, and on Linux a process begins with that of the
    # program which started it, so that a child of a large one would seem large itself.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
