"""Section of bench/gpu.py: the head forward and backward by several methods, against materialised logits."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import head_triton
import torch
import torch.nn.functional as F
from contenders import clock
from gpu_setup import TOP_K, RandomTeacher, Setup
from torch import Tensor

from neko_lean.errors import first_line
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.lm_head import CHUNK_ELEMENTS

ROWS, TOY_ROWS = 2048, 24
WARM_UPS, REPEATS = 3, 10

Method = Callable[..., Tensor]
"""`method(hidden, weight, target, teacher)` returns the loss: mean NLL, plus mean KL if there is a teacher."""


@dataclass(frozen=True)
class Problem:
    """Arguments of the head."""

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    target: Tensor  # [N]
    teacher: tuple[Tensor, ...]  # ids [N, k], log-probabilities [N, k], log of the tail [N]; or empty

    def converted(self, dtype: torch.dtype) -> Problem:
        floats = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in self.teacher]
        return Problem(self.hidden.to(dtype), self.weight.to(dtype), self.target, tuple(floats))


def make_problem(setup: Setup, with_teacher: bool) -> Problem:
    """Random hidden states and weights, so that logits have a standard deviation of about 1."""
    torch.manual_seed(0)
    rows, width, vocabulary = TOY_ROWS if setup.toy else ROWS, setup.sizes["hidden_size"], setup.sizes["vocab_size"]
    hidden = torch.randn(rows, width, device=setup.device).bfloat16()
    weight = (torch.randn(vocabulary, width, device=setup.device) / width**0.5).bfloat16()
    target = torch.randint(0, vocabulary, (rows,), device=setup.device)
    teacher = RandomTeacher(vocabulary)
    ids = (torch.randint(0, vocabulary, (rows, 1)) + 7 * torch.arange(TOP_K)) % vocabulary
    entries = (ids, teacher.logp.repeat(rows, 1), torch.full((rows,), 0.3).log())
    return Problem(hidden, weight, target, tuple(t.to(setup.device) for t in entries) if with_teacher else ())


# Methods


def chunked(stats: Callable[..., tuple[Tensor, Tensor]], *arguments: Tensor) -> Tensor:
    """The loss from token_stats or a variant of it."""
    target_logp, kl = stats(*arguments)
    return kl.mean() - target_logp.mean()


def materialised(hidden: Tensor, weight: Tensor, target: Tensor, *teacher: Tensor) -> Tensor:
    """The loss from all logits at once, in float32 (float64 for float64)."""
    z = hidden @ weight.T
    z = z if z.dtype == torch.float64 else z.float()  # [N, V]
    loss = F.cross_entropy(z, target)
    if not teacher:
        return loss
    ids, logp, tail_logp = teacher
    lse = z.logsumexp(1)  # [N]
    tail_lse = z.scatter(1, ids, -torch.inf).logsumexp(1)  # [N]
    topk = (logp.exp() * (logp - z.gather(1, ids) + lse[:, None])).sum(1)
    return loss + (topk + tail_logp.exp() * (tail_logp - tail_lse + lse)).mean()


def liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)
    return loss


def cut_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden, weight, target)
    return loss


def methods(with_teacher: bool) -> dict[str, Method]:
    """The methods by name. Liger's and Apple's know no teacher."""
    found: dict[str, Method] = {
        "materialised": materialised,
        "token_stats": partial(chunked, token_stats),
        "token_stats, compiled passes": partial(
            chunked, partial(head_triton.token_stats, kernels=head_triton.compiled())
        ),
    }
    if head_triton.TRITON is not None:
        stats = partial(head_triton.token_stats, kernels=head_triton.TRITON)
        found["token_stats, Triton passes"] = partial(chunked, stats)
    if not with_teacher:
        found |= {"Liger": liger, "cut-cross-entropy": cut_cross_entropy}
    return found


# Measurements


def measure_head(setup: Setup) -> dict[str, Any]:
    """Time, memory and error of each method, without and with a teacher, or the error with which it fails."""
    results: dict[str, Any] = {"chunk_bytes": 4 * CHUNK_ELEMENTS}
    for loss, with_teacher in (("target", False), ("target and KL", True)):
        problem = make_problem(setup, with_teacher)
        reference = loss_and_gradients(materialised, problem.converted(torch.float64))
        results[loss] = {}
        for name, method in methods(with_teacher).items():
            try:
                results[loss][name] = measure(method, problem, reference, 2 if setup.toy else REPEATS)
            except Exception as error:  # a package that is missing, or a kernel that this GPU or version does not run
                results[loss][name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
        baseline = results[loss]["materialised"]
        for result in results[loss].values():
            if "seconds" in result and "seconds" in baseline:
                result["ratio"] = result["seconds"] / baseline["seconds"]
        del problem, reference
    if head_triton.TRITON is None:
        results["left_out"] = "Triton passes: the triton package is missing"
    return results


def measure(method: Method, problem: Problem, reference: list[Tensor], repeats: int) -> dict[str, Any]:
    """Median seconds and peak of a forward and backward pass, and its errors against float64."""
    device, cuda = problem.hidden.device, problem.hidden.is_cuda
    outcome = loss_and_gradients(method, problem)
    errors = {
        name: relative_error(actual, expected)
        for name, actual, expected in zip(("loss", "grad_hidden", "grad_weight"), outcome, reference, strict=True)
    }
    results = sum(tensor.numel() * tensor.element_size() for tensor in outcome)
    del outcome

    seconds = []
    for number in range(WARM_UPS + repeats):
        if cuda and number == WARM_UPS:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        start = clock(device)
        loss_and_gradients(method, problem)
        seconds.append(clock(device) - start)
    extra = torch.cuda.max_memory_allocated(device) - before - results if cuda else None
    return {"seconds": statistics.median(seconds[WARM_UPS:]), "extra_bytes": extra, "errors": errors}


def loss_and_gradients(method: Method, problem: Problem) -> list[Tensor]:
    """The loss and its gradients with respect to hidden states and weight."""
    leaves = [tensor.detach().requires_grad_() for tensor in (problem.hidden, problem.weight)]
    loss = method(*leaves, problem.target, *problem.teacher)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def relative_error(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Difference in the 2-norm and the largest one, both relative to the same norm of the expected values."""
    difference = actual.double() - expected
    largest = (difference.abs().max() / expected.abs().max()).item()
    return {"norm": (difference.norm() / expected.norm()).item(), "largest": largest}
