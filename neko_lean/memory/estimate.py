"""What a prediction returns: the bytes that a training step holds on the device and in host memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# cuBLAS and cuBLASLt workspaces as PyTorch allocates them on a Hopper GPU, 32 MiB each. They are smaller on other GPUs.
WORKSPACES = 2**26

# Memory that CUDA and its libraries take from a GPU in addition to tensors.
CONTEXT = 600 * 2**20 + WORKSPACES

# Code that the first step loads: the model's and bitsandbytes' modules, and pages of torch's kernels, but no tensors.
# Measured as the growth of the process, beyond the weights, when it loads a model of 5 MiB and takes its first step.
FIRST_USE = 25 * 2**20

# Names of the lines of a prediction that others refer to.
STUDENT = "student weights"
ADAM_STATE = "Adam state"
GATHERED = "gathered from other ranks"
TRANSIENT = "peak of all but weights and state"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step needs."""

    lines: dict[str, int]
    """Bytes by purpose, on the device and in host memory together."""

    peak: int
    """Peak on the device."""

    host: int
    """Host memory that offloading uses."""

    cpu: int = 0
    """On a CPU: bytes beyond the tensors that kernels and the allocator add to the resident set."""

    def peak_on(self, device: torch.device) -> int:
        """Peak bytes on `device`: what PyTorch allocates on a GPU, or the growth of the resident set on a CPU."""
        return self.peak + (self.host + self.cpu if device.type == "cpu" else WORKSPACES)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step before the choice of what to offload."""

    lines: dict[str, int]
    """Bytes by purpose, with everything on the device."""

    offloadable: int
    """Bytes of layer inputs that `offload_activations` moves to host memory."""

    cpu: int
    """As in `MemoryEstimate`."""

    def estimate(self, offload_state: bool, offload_activations: bool) -> MemoryEstimate:
        """The estimate with these two offloading options."""
        host = (self.lines[ADAM_STATE] if offload_state else 0) + (self.offloadable if offload_activations else 0)
        total = sum(self.lines.get(name, 0) for name in (STUDENT, ADAM_STATE, GATHERED, TRANSIENT))
        return MemoryEstimate(self.lines, total - host, host, self.cpu)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Total size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
