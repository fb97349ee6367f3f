"""The in-backward optimizer: parity with bitsandbytes and torchao, gradients freed at once, saved state."""

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from neko_lean.errors import NekoLeanError
from neko_lean.training import optimizer as optim
from neko_lean.training.adam_state import state_size
from neko_lean.training.optimizer import InBackwardAdam8bit


def attached(parameters, **options):
    """An optimizer that autograd calls, for parameters named p0, p1, ..."""
    optimizer = InBackwardAdam8bit([(f"p{n}", p) for n, p in enumerate(parameters)], **options)
    optimizer.attach()
    return optimizer


@pytest.mark.parametrize("part", [4096, 2**22])
@pytest.mark.parametrize(("weight_decay", "theirs"), [(0.0, "Adam8bit"), (0.1, "Adam8bit"), (0.1, "AdamW8bit")])
def test_float32_weights_match_bitsandbytes_bit_for_bit(monkeypatch, part, weight_decay, theirs):
    reference_class = getattr(bnb.optim, theirs)
    monkeypatch.setattr(optim, "SLICE", part)
    torch.manual_seed(0)
    shapes = [(100, 130), (64, 64), (40,), (5000,)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = attached(ours, weight_decay=weight_decay)
    reference = reference_class(theirs, weight_decay=weight_decay)
    for step in range(5):
        lr = 1e-2 / (step + 1)
        gradients = [torch.randn(s) for s in shapes]
        mine.begin_step(lr)
        sum((p * g).sum() for p, g in zip(ours, gradients, strict=True)).backward()
        for group in reference.param_groups:
            group["lr"] = lr
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g
        reference.step()
        for actual, expected in zip(ours, theirs, strict=True):
            assert torch.equal(actual, expected)
            assert actual.grad is None


def test_bfloat16_weights_move_as_far_as_float32_weights():
    """At lr 5e-5, rounding to nearest would leave most weights near 0.02 unchanged."""
    torch.manual_seed(0)
    start = torch.full((8192,), 0.02).bfloat16()
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = attached([p])
        for _ in range(100):
            optimizer.begin_step(5e-5)
            p.sum().backward()
        moved[dtype] = (start.double() - p.detach().double()).mean().item()
    assert moved[torch.float32] == pytest.approx(100 * 5e-5, rel=0.02)
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.02)


def test_the_same_seed_gives_the_same_weights_and_close_removes_the_hooks():
    def train(seed):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5000).bfloat16())
        optimizer = attached([p], seed=seed)
        for _ in range(3):
            optimizer.begin_step(1e-3)
            (p.float() ** 2).sum().backward()
        optimizer.close()
        before = p.detach().clone()
        (p.float() ** 2).sum().backward()
        assert torch.equal(p, before) and p.grad is not None
        return before

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


def test_state_takes_two_bytes_per_weight_and_two_scales_per_block():
    large, small = torch.nn.Parameter(torch.randn(256 * 100)), torch.nn.Parameter(torch.randn(100))
    optimizer = attached([large, small])
    optimizer.begin_step(1e-3)
    (large.sum() + small.sum()).backward()
    assert optimizer.state_bytes() == 2 * 25600 + 2 * 4 * 100 + 2 * 4 * 100
    assert optimizer.state_bytes() == state_size(25600) + state_size(100)


def train(parameters, steps, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.begin_step(1e-2)
        sum((p * torch.randn(p.shape, generator=generator).to(p.device)).sum() for p in parameters).backward()


@pytest.mark.parametrize("bits", [8, 4])
def test_resuming_from_a_state_dict_gives_the_same_bits(tmp_path, bits):
    if bits == 4:
        pytest.importorskip("torchao")
    torch.manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(s).bfloat16()) for s in ((64, 128), (40,), (100, 130))]
    train(whole, 3, first := attached(whole, bits=bits, seed=5), 1)
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    train(whole, 3, first, 2)
    second = attached(resumed, bits=bits, seed=9)
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    train(resumed, 3, second, 2)
    assert second.step == 6
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))
    other = attached([torch.nn.Parameter(torch.randn(64, 64))], bits=bits)
    with pytest.raises(NekoLeanError, match="another model"):
        other.load_state_dict(first.state_dict())
    fewer = first.state_dict()
    del fewer["state.p0.scale2"]
    with pytest.raises(NekoLeanError, match="other parameters"):
        second.load_state_dict(fewer)
    wider = {**first.state_dict(), "state.p0.scale2": torch.zeros(1000)}
    with pytest.raises(NekoLeanError, match=r"p0.scale2 has shape \[1000\]"):
        second.load_state_dict(wider)


def test_clipping_scales_one_tensors_gradient_to_the_norm(monkeypatch):
    monkeypatch.setattr(optim, "SLICE", 4096)
    seen = {}
    for clip, factor in ((0.0, 10.0), (1.0, 10.0), (1.0, 0.1)):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(100, 100))
        gradient = torch.randn(100, 100)
        gradient *= factor / gradient.norm()
        optimizer = attached([p], clip=clip, eps=1.0)  # with a large eps the update is proportional to the gradient
        optimizer.begin_step(1.0)
        before = p.detach().clone()
        (p * gradient).sum().backward()
        seen[clip, factor] = (before - p.detach()).norm().item()
    # The first update is g / (|g| + eps), where |g| is much smaller than eps.
    assert seen[0.0, 10.0] == pytest.approx(10.0, rel=0.15)
    assert seen[1.0, 10.0] == pytest.approx(1.0, rel=0.05)
    assert seen[1.0, 0.1] == pytest.approx(0.1, rel=0.05)


def test_4bit_updates_equal_those_of_torchao(monkeypatch):
    torchao = pytest.importorskip("torchao.optim")
    from torchao.optim.adam import single_param_adam

    # Without torch.compile, which would need a C++ compiler. The arithmetic is the same.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(optim, "SLICE", 4096)
    assert single_param_adam
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((64, 256), (100,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = attached(ours, bits=4, weight_decay=0.1)
    reference = torchao.AdamW4bit(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        gradients = [torch.randn(p.shape) for p in ours]
        mine.begin_step(1e-2)
        sum((p * g).sum() for p, g in zip(ours, gradients, strict=True)).backward()
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g
        reference.step()
    assert all(
        torch.allclose(actual, expected, rtol=1e-6, atol=1e-7) for actual, expected in zip(ours, theirs, strict=True)
    )
    assert mine.state_bytes() == state_size(64 * 256, 4) + state_size(100, 4) == 64 * 256 + 8 * 128 + 800


def test_4bit_state_without_torchao_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim.adam", None)
    with pytest.raises(NekoLeanError, match=r"neko-lean\[torchao\]"):
        attached([torch.nn.Parameter(torch.randn(10))], bits=4)


@pytest.mark.cuda
@pytest.mark.parametrize("bits", [8, pytest.param(4, id="4 bits, compiled by torchao")])
def test_state_in_pinned_memory_gives_the_same_bits_on_a_gpu(gpu, monkeypatch, bits):
    if bits == 4:
        pytest.importorskip("torchao")
    monkeypatch.setattr(optim, "SLICE", 2**16)  # each slice is fetched while another one is in use
    shapes = [(1000, 700), (40,), (512, 512)]

    def weights_and_state(offload):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape).bfloat16().to(gpu)) for shape in shapes]
        optimizer = attached(parameters, bits=bits, offload=offload, seed=5)
        train(parameters, 5, optimizer, 1)
        state = optimizer.state_dict()
        assert all(t.is_pinned() == offload for name, t in state.items() if name.startswith("state."))
        return [tensor.detach().cpu() for tensor in (*parameters, *state.values())]

    on_gpu, in_host_memory = weights_and_state(False), weights_and_state(True)
    assert all(torch.equal(one, other) for one, other in zip(on_gpu, in_host_memory, strict=True))


@pytest.mark.cuda
def test_the_8bit_update_on_a_gpu_is_that_of_the_cpu(gpu):
    """The two kernels of bitsandbytes round the state's codes differently at most."""
    shapes = [(100, 130), (64, 64), (40,), (5000,)]
    ends = {}
    for device in ("cpu", gpu):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in shapes]
        starts = [p.detach().cpu().clone() for p in parameters]
        train(parameters, 5, attached(parameters, weight_decay=0.1), 1)
        ends[str(device)] = [p.detach().cpu() for p in parameters]
    for start, one, other in zip(starts, *ends.values(), strict=True):
        assert (one - other).norm() < 0.01 * (one - start).norm()


@pytest.mark.cuda
def test_a_generator_on_a_gpu_is_saved_and_restored(gpu, tmp_path):
    first = attached([torch.nn.Parameter(torch.ones(8192, device=gpu).bfloat16())], seed=5)
    train(first.parameters.values(), 3, first, 1)
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = attached([torch.nn.Parameter(p.detach().clone()) for p in first.parameters.values()], seed=9)
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for optimizer in (first, second):
        train(optimizer.parameters.values(), 3, optimizer, 2)
    assert torch.equal(first.parameters["p0"], second.parameters["p0"])
