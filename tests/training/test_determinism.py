"""Deterministic kernels: asked for on a GPU only, for as long as a run lasts, and done without where there are none."""

import os

import pytest
import torch

from neko_lean.training import determinism
from neko_lean.training.determinism import deterministic, deterministic_device
from tests.helpers import tiny

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class OnGpu:
    """A student that says it lies on a GPU."""

    def __init__(self, lm):
        self.lm, self.device = lm, GPU

    def __getattr__(self, name):
        return getattr(self.lm, name)


@pytest.fixture
def student(monkeypatch):
    lm = OnGpu(tiny("Llama"))
    monkeypatch.setattr(determinism, "plain_gradients", lambda student: None)
    return lm


def test_the_mode_lasts_as_long_as_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(KeyError), deterministic(GPU):
        assert torch.are_deterministic_algorithms_enabled()
        # Attention takes its deterministic kernel only where the mode does more than warn.
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_student_is_asked_in_that_mode(student, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        determinism, "_small_loss", lambda _: asked.append(torch.are_deterministic_algorithms_enabled())
    )
    assert deterministic_device(student) == GPU and asked == [True]
    assert deterministic_device(student.lm) == CPU and asked == [True]
    assert capsys.readouterr().err == ""


def test_without_deterministic_kernels_it_warns_and_does_without(student, monkeypatch, capsys):
    def refuse(_):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr(determinism, "_small_loss", refuse)
    assert deterministic_device(student) == CPU
    said = capsys.readouterr().err
    assert said.startswith("warning: on this GPU two runs of LlamaForCausalLM differ by rounding")
    assert "cumsum_cuda_kernel" in said
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_else_is_wrong_is_left_to_later_checks(student, monkeypatch, capsys):
    def refuse(_):
        raise RuntimeError("expected scalar type Half but found Float")

    monkeypatch.setattr(determinism, "_small_loss", refuse)
    assert deterministic_device(student) == GPU and capsys.readouterr().err == ""


def test_the_heads_pass_leaves_no_gradient(student):
    determinism._small_loss(student)
    assert all(parameter.grad is None for parameter in student.model.parameters())


def test_a_run_trains_in_that_mode(unlearn, tmp_path, monkeypatch):
    """The device is a CPU, so its trainer is told otherwise."""
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
