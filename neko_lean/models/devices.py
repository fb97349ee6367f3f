"""Devices, dtypes and seeds: check what a user asked for."""

from __future__ import annotations

import re

import torch

from neko_lean.distributed import local_rank, local_world_size, world_size
from neko_lean.errors import NekoLeanError
from neko_lean.terminal import log_line

# Largest seed: torch's largest, minus room for the step and rank numbers that are added to a seed.
MAX_SEED = 2**63 - 1

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,9})?")


def pick_device(name: str | None = None) -> torch.device:
    """Parse and check the name of a device.

    Args:
        name: 'cpu', 'cuda' or 'cuda:N'; None: CUDA if available, else the CPU. Under torchrun 'cuda' is the rank's own
            GPU.

    Raises:
        NekoLeanError: the device is not supported or not available.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if _DEVICE.fullmatch(name) is None:
        raise NekoLeanError(f"device {name!r} is not supported; use cpu, cuda or cuda:N.")

    if world_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise NekoLeanError(f"under torchrun each rank uses its own GPU; pass --device cuda, not {name}.")
        _refuse_more_ranks_than_gpus()
        name = f"cuda:{local_rank()}"

    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise NekoLeanError(f"device {name!r} is not available: PyTorch finds no GPU; use --device cpu.")
        count = torch.cuda.device_count()
        if int(name.removeprefix("cuda").removeprefix(":") or 0) >= count:
            raise NekoLeanError(f"device {name!r} does not exist; the last GPU that PyTorch finds is cuda:{count - 1}.")
    return torch.device(name)


def pick_dtype(name: str) -> torch.dtype:
    """'bfloat16' or 'float32' as a torch.dtype. Raises NekoLeanError for other names."""
    if name not in DTYPES:
        raise NekoLeanError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def check_seed(seed: int) -> int:
    """Return the seed. Raises NekoLeanError unless it is an integer from 0 to 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise NekoLeanError(f"seed must be an integer from 0 to {MAX_SEED}, got {_shorten(seed)}.")
    return seed


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware. A CPU that emulates it is tens of times slower."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_emulated_bfloat16(dtype: str, device: torch.device, quiet: bool) -> None:
    """Warn that training in bfloat16 will be slow if the device only emulates it."""
    if dtype == "bfloat16" and not has_bfloat16(device):
        log_line(
            "warning: steps will be slow, because this CPU emulates bfloat16; --set dtype=float32 is faster.", quiet
        )


def _shorten(value: object) -> str:
    """A value for an error message. Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "one of more than 30 digits"
    return repr(value)


def _refuse_more_ranks_than_gpus() -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < local_world_size():
        raise NekoLeanError(
            f"torchrun started {local_world_size()} processes on this machine, which has {gpus} GPU{'s' * (gpus > 1)}, "
            f"but each process needs its own GPU; use --nproc-per-node {gpus}, or --device cpu."
        )
