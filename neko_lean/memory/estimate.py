"""What a prediction returns: the bytes that a training step holds on the device and in host memory, by purpose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neko_lean.memory.step_time import MatmulParameters

# cuBLAS and cuBLASLt workspaces as PyTorch allocates them on a Hopper GPU, 32 MiB each. They are smaller on other GPUs.
WORKSPACES = 2**26

# Memory that CUDA and its libraries take from a GPU in addition to tensors.
CONTEXT = 600 * 2**20 + WORKSPACES

# What loading a model and the first step take apart from tensors. Measured with a model of 0.3 MiB: 19 MiB of code
# pages (RssFile, almost all of libtorch), 11 MiB of modules that loading imports, and 3 MiB of heap that a step leaves.
FIRST_USE = 33 * 2**20

# Below this peak on a CPU, what cannot be predicted is no longer small: up to 100 MiB were seen above the prediction
# for models of a few million parameters, mostly freed blocks in glibc's heap. Larger peaks were within 8 %.
PREDICTABLE_CPU_PEAK = 2**29

# Names of the lines of an estimate.
STUDENT = "student weights"
TEACHER = "teacher weights"
ADAM_STATE = "Adam state"
GATHERED = "gathered from other ranks"
LAYER_INPUTS = "layer inputs"
GRADIENTS = "gradients"
LOGITS = "logits of a chunk"
UPDATE = "working memory of the update"
ACTIVATIONS = "activations"
LINES = (STUDENT, TEACHER, ADAM_STATE, GATHERED, LAYER_INPUTS, GRADIENTS, LOGITS, UPDATE, ACTIVATIONS)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step needs."""

    lines: dict[str, int]
    """Bytes on the device at the moment of the peak, by purpose. They add up to the peak."""

    host_lines: dict[str, int]
    """Bytes of pinned host memory that offloading uses, by purpose."""

    cpu_peak: int | None
    """Growth of the resident set if the step runs on a CPU; None if that is not predicted."""

    @property
    def peak(self) -> int:
        """Peak bytes on the device."""
        return sum(self.lines.values())

    @property
    def host(self) -> int:
        """Bytes of pinned host memory."""
        return sum(self.host_lines.values())

    def peak_on(self, device: torch.device) -> int:
        """Peak bytes on `device`: what PyTorch allocates on a GPU, or the growth of the resident set on a CPU."""
        if device.type == "cpu" and self.cpu_peak is not None:
            return self.cpu_peak
        return self.peak + WORKSPACES

    def as_json(self) -> dict[str, Any]:
        """All values by name."""
        return {
            "lines": self.lines,
            "peak": self.peak,
            "host_lines": self.host_lines,
            "host": self.host,
            "cpu_peak": self.cpu_peak,
        }


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step before the choice of what to offload."""

    weights: int
    adam_state: int
    gathered: int
    """Weights that a rank has gathered from the others when it needs most."""

    transient: dict[str, int]
    """Everything else at the moment of its peak, by purpose."""

    transient_without_inputs: dict[str, int]
    """The same at the moment when everything except the layers' inputs peaks."""

    inputs_in_transit: int
    """Layer inputs on the device if they are offloaded: the one in use and the next one."""

    pinned_state: int
    """Adam's state in pinned host memory."""

    pinned_inputs: int
    """The layers' inputs in pinned host memory."""

    cpu_peak: int
    """As in `MemoryEstimate`."""

    matmul: MatmulParameters
    """Parameters that a step multiplies with, from which its time follows."""

    def estimate(self, offload_state: bool, offload_activations: bool) -> MemoryEstimate:
        """The estimate with these two offloading options."""
        lines = {STUDENT: self.weights, ADAM_STATE: self.adam_state, GATHERED: self.gathered, **self.transient}
        host = {}
        if offload_activations:
            lines = {name: count for name, count in lines.items() if name not in self.transient}
            lines |= {**self.transient_without_inputs, LAYER_INPUTS: self.inputs_in_transit}
            host[LAYER_INPUTS] = self.pinned_inputs
        if offload_state:
            del lines[ADAM_STATE]
            host[ADAM_STATE] = self.pinned_state
        return MemoryEstimate({name: lines[name] for name in LINES if lines.get(name)}, host, self.cpu_peak)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Total size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Bytes that allocations of these sizes take in pinned host memory: PyTorch rounds each up to a power of two."""
    return sum(1 << (size - 1).bit_length() for size in sizes if size)
