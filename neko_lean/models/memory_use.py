"""Memory in use and its peak: what PyTorch has allocated on a GPU, or the resident set of this process on a CPU."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory` reports. That of the process can be reset on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # 5 resets the peak only, see proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5")


def trim_memory() -> None:
    """Return freed blocks from the allocator to the system, so that later growth is not hidden by their reuse.

    Works with glibc only.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now: what PyTorch has allocated on a GPU, or the resident set of this process on a CPU, including
    mapped files (on systems that do not report it, its peak)."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory()


def resident_memory() -> int:
    """Resident set of this process in bytes, including mapped files; on systems that do not report it, its peak."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return _process_peak()


def peak_memory(device: torch.device, before: int = 0) -> int:
    """Largest `memory_in_use` since `reset_peak_memory`, above `before`, in bytes.

    A run's peak memory is the one above what was in use before the run.
    """
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_peak()
    return peak - before


def _process_peak() -> int:
    # VmHWM rather than ru_maxrss where available: ru_maxrss cannot be reset, and on Linux a process inherits that of
    # its parent, so the child of a large process would seem large itself.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
