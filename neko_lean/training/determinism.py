"""Deterministic kernels, so that a resumed run on a GPU ends in the same weights as an uninterrupted one.

On a CPU, the kernels that training uses are deterministic anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from neko_lean.distributed import world_size
from neko_lean.errors import NekoLeanError, first_line
from neko_lean.models import CausalLM, token_stats
from neko_lean.terminal import log_line
from neko_lean.training.backward import plain_gradients

torch_deterministic: Any = torch.utils.deterministic  # its type stub lacks the attribute that is set below


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within this context, PyTorch uses deterministic kernels on a GPU and raises RuntimeError if there is none.

    Otherwise the backward pass of attention (SDPA) and `index_add` are not deterministic. On a CPU this does nothing.
    """
    if device.type != "cuda":
        yield
        return

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for matrix products in this mode
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch_deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch_deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch_deterministic.fill_uninitialized_memory = fill


def deterministic_device(student: CausalLM) -> torch.device:
    """The device to pass to `deterministic` for the steps of this student.

    That is the student's device. If a kernel that the student needs is not deterministic, a warning is printed and the
    CPU is returned, for which `deterministic` does nothing. It is also returned for a student that is sharded across
    ranks.
    """
    device = student.device
    if device.type == "cpu" or world_size() > 1:
        return torch.device("cpu")

    try:
        with deterministic(device):
            plain_gradients(student)
            _head_gradients(student)
    except (RuntimeError, NekoLeanError) as error:
        if "deterministic" not in str(error).lower():
            return device  # later checks report what else is wrong with the model
        log_line(
            f"warning: results are not reproducible to the last bit on this GPU, not even with --resume: two runs of "
            f"{type(student.model).__name__} differ by rounding ({first_line(error)})."
        )
        return torch.device("cpu")
    return device


def _head_gradients(student: CausalLM) -> None:
    """Run the head forward and backward for two positions with a teacher."""
    head = student.head.detach()  # [V, d]
    hidden = torch.zeros(2, head.shape[1], dtype=head.dtype, device=head.device, requires_grad=True)  # [N, d]
    ids = torch.tensor([[0, 1], [1, 0]], device=head.device)  # [N, k]
    logp = torch.full((2, 2), -1.0, device=head.device)  # [N, k]
    target_logp, kl = token_stats(hidden, head, ids[:, 0], ids, logp, logp[:, 0], transform=student.transform)
    torch.autograd.grad((target_logp + kl).sum(), hidden)
