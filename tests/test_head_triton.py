"""The candidate kernels of the head give the package's values and gradients."""

import importlib

import pytest
import torch

from neko_lean.models import token_stats


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    """The module and its kernels; Triton's run in its interpreter if there is no GPU."""
    if request.param == "triton":
        pytest.importorskip("triton")
    module = importlib.import_module("bench.head_triton")
    monkeypatch.setattr(module, "LSE_BLOCK", 32)  # several blocks, the last of them partly outside
    monkeypatch.setattr(module, "GRAD_BLOCK", 32)
    return module, {"torch": module.TORCH, "triton": module.TRITON}[request.param]


def problem(dtype, k, device, rows=11, width=16, vocabulary=70):
    """Arguments of token_stats: rows without target, without teacher, without tail, and with few entries."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).mul(2).to(dtype)
    weight = torch.randn(vocabulary, width, generator=g).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), generator=g)
    target[3] = -1
    logp, ids = torch.randn(rows, vocabulary, generator=g).mul(3).log_softmax(1).topk(k, dim=1)
    target[5] = ids[5, 0]  # the teacher's most likely token
    tail = (1 - logp.exp().sum(1)).clamp(min=0).log()
    tail[6 if k < vocabulary else slice(None)] = -torch.inf
    logp[7, 1:] = -torch.inf
    logp[8], tail[8] = -torch.inf, -torch.inf
    return [tensor.to(device) for tensor in (hidden, weight, target, ids, logp, tail)]


def values_and_gradients(function, hidden, weight, target, *teacher, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    stats = function(*leaves, target, *teacher, **options)
    upstream = torch.randn(2, len(target), generator=torch.Generator().manual_seed(1)).to(hidden.device)
    return [*stats, *torch.autograd.grad((torch.stack(stats) * upstream).sum(), leaves)]


@pytest.mark.parametrize("k", [0, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_package(kernels, dtype, k):
    module, chosen = kernels
    hidden, weight, target, *teacher = problem(dtype, max(k, 1), "cuda" if torch.cuda.is_available() else "cpu")
    teacher = teacher if k else []
    expected = values_and_gradients(token_stats, hidden, weight, target, *teacher, chunk=4)
    actual = values_and_gradients(module.token_stats, hidden, weight, target, *teacher, kernels=chosen, chunk=4)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, one, other in zip(("logp", "kl", "hidden", "weight"), actual, expected, strict=True):
        assert one.isfinite().all(), name
        limit = 1e-5 if name in ("logp", "kl") else tolerance
        torch.testing.assert_close(one, other, rtol=limit, atol=limit * other.abs().max().item(), msg=name)


@pytest.mark.cuda
def test_full_blocks_on_a_gpu_give_the_values_of_the_package(gpu):
    pytest.importorskip("triton")
    module = importlib.import_module("bench.head_triton")
    hidden, weight, target, *teacher = problem(torch.bfloat16, 64, gpu, rows=50, width=256, vocabulary=50304)
    expected = values_and_gradients(token_stats, hidden, weight, target, *teacher)
    actual = values_and_gradients(module.token_stats, hidden, weight, target, *teacher, kernels=module.TRITON)
    for one, other, limit in zip(actual, expected, (1e-5, 1e-5, 2e-2, 2e-2), strict=True):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit * other.abs().max().item())
