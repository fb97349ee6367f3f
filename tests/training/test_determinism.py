"""Deterministic kernels: used on a GPU during a run, unless the student needs a kernel that has no such version."""

import os

import pytest
import torch

from neko_lean.training import determinism
from neko_lean.training.determinism import deterministic, deterministic_device
from tests.checkpoints.interrupted import result
from tests.helpers import SMALL, model_weights, tiny

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class OnGpu:
    """A student that claims to be on a GPU."""

    def __init__(self, lm):
        self.lm, self.device = lm, GPU

    def __getattr__(self, name):
        return getattr(self.lm, name)


@pytest.fixture
def student(monkeypatch):
    lm = OnGpu(tiny("Llama"))
    monkeypatch.setattr(determinism, "plain_gradients", lambda student: None)
    return lm


def test_the_mode_ends_with_its_context(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(KeyError), deterministic(GPU):
        assert torch.are_deterministic_algorithms_enabled()
        # Attention uses its deterministic kernel only if the mode does more than warn.
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_the_check_runs_in_that_mode(student, monkeypatch, capsys):
    modes = []
    monkeypatch.setattr(
        determinism, "_head_gradients", lambda _: modes.append(torch.are_deterministic_algorithms_enabled())
    )
    assert deterministic_device(student) == GPU and modes == [True]
    assert deterministic_device(student.lm) == CPU and modes == [True]
    assert capsys.readouterr().err == ""


def test_without_deterministic_kernels_it_warns_and_continues(student, monkeypatch, capsys):
    def refuse(_):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr(determinism, "_head_gradients", refuse)
    assert deterministic_device(student) == CPU
    err = capsys.readouterr().err
    assert err.startswith("warning: results are not reproducible to the last bit on this GPU")
    assert "two runs of LlamaForCausalLM differ by rounding" in err
    assert "cumsum_cuda_kernel" in err
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_are_left_to_later_checks(student, monkeypatch, capsys):
    def refuse(_):
        raise RuntimeError("expected scalar type Half but found Float")

    monkeypatch.setattr(determinism, "_head_gradients", refuse)
    assert deterministic_device(student) == GPU and capsys.readouterr().err == ""


def test_the_check_of_the_head_leaves_no_gradient(student):
    determinism._head_gradients(student)
    assert all(parameter.grad is None for parameter in student.model.parameters())


def test_a_run_trains_in_that_mode(unlearn, tmp_path, monkeypatch):
    """The device is a CPU, so the trainer is made to believe that it is a GPU."""
    from neko_lean.training import trainer

    seen = []
    original = trainer.Trainer._update
    monkeypatch.setattr(trainer, "deterministic_device", lambda student: GPU)

    def update(self, *arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_update", update)
    unlearn(tmp_path / "out")
    assert seen == [True] * 10 and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.cuda
@pytest.mark.parametrize("change", [{}, {"dtype": "float32"}, {"backward": "plain", "dropout": True}])
def test_two_runs_on_a_gpu_end_in_the_same_bytes(unlearn, tmp_path, change):
    for name in ("one", "two"):
        unlearn(tmp_path / name, {**SMALL, **change}, device="cuda")
    assert result(tmp_path / "one") == result(tmp_path / "two")


@pytest.mark.cuda
def test_offloading_changes_no_bit_on_a_gpu(unlearn, tmp_path):
    unlearn(tmp_path / "whole", device="cuda")
    unlearn(tmp_path / "offloaded", {**SMALL, "offload_state": True, "offload_activations": True}, device="cuda")
    whole, offloaded = model_weights(tmp_path / "whole"), model_weights(tmp_path / "offloaded")
    assert all(torch.equal(tensor, offloaded[name]) for name, tensor in whole.items())
