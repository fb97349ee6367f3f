"""Kernels that give the same bits each time, so that a resumed run on a GPU ends in the weights of an unbroken one.

On a CPU the kernels that training uses give the same bits anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neko_lean.distributed import world_size
from neko_lean.errors import NekoLeanError, first_line
from neko_lean.models import CausalLM, token_stats
from neko_lean.terminal import log_line
from neko_lean.training.backward import plain_gradients


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """While it lasts, PyTorch uses deterministic kernels on a GPU, and raises RuntimeError where it has none.

    Attention's backward pass (SDPA) and `index_add` are not deterministic otherwise. On a CPU it does nothing.
    """
    if device.type != "cuda":
        yield
        return
    # PyTorch asks for this before it multiplies matrices in this mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def deterministic_device(student: CausalLM) -> torch.device:
    """The device to hand to `deterministic` for this student's steps: its own, or the CPU, which changes nothing, where
    a kernel that the student needs is not deterministic. Then it warns.

    Students spread over ranks are not asked: their kernels are left as they are.
    """
    device = student.device
    if device.type == "cpu" or world_size() > 1:
        return torch.device("cpu")
    try:
        with deterministic(device):
            plain_gradients(student)
            _small_loss(student)
    except (RuntimeError, NekoLeanError) as error:
        if "deterministic" not in str(error).lower():
            return device  # what else is wrong with the model, later checks say
        log_line(
            f"warning: on this GPU two runs of {type(student.model).__name__} differ by rounding, and --resume does "
            f"not end in the same weights bit for bit ({first_line(error)})."
        )
        return torch.device("cpu")
    return device


def _small_loss(student: CausalLM) -> None:
    """The head's forward and backward pass for two rows, with a teacher."""
    head = student.head.detach()
    hidden = torch.zeros(2, head.shape[1], dtype=head.dtype, device=head.device, requires_grad=True)
    ids = torch.tensor([[0, 1], [1, 0]], device=head.device)
    logp = torch.full((2, 2), -1.0, device=head.device)
    target_logp, kl = token_stats(hidden, head, ids[:, 0], ids, logp, logp[:, 0], transform=student.transform)
    torch.autograd.grad((target_logp + kl).sum(), hidden)
