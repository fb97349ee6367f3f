"""Devices and dtypes that are not supported or not available are refused."""

import pytest
import torch

from neko_lean.errors import NekoLeanError
from neko_lean.models.devices import pick_device, pick_dtype, warn_emulated_bfloat16
from neko_lean.models.memory_use import memory_in_use, peak_memory, reset_peak_memory

CPU = torch.device("cpu")


def test_a_cpu_that_emulates_bfloat16_is_warned_about(monkeypatch, capsys):
    warn_emulated_bfloat16("bfloat16", CPU, quiet=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    warn_emulated_bfloat16("float32", CPU, quiet=False)
    assert capsys.readouterr().err == ""
    warn_emulated_bfloat16("bfloat16", CPU, quiet=False)
    assert "--set dtype=float32 is faster" in capsys.readouterr().err


def test_unknown_devices_and_dtypes_and_missing_gpus_are_refused(monkeypatch):
    with pytest.raises(NekoLeanError, match="dtype must be one of bfloat16, float32, got 'float16'"):
        pick_dtype("float16")
    for name in ("gpu", "meta"):
        with pytest.raises(NekoLeanError, match=f"device '{name}' is not supported; use cpu, cuda or cuda:N"):
            pick_device(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(
        NekoLeanError, match="device 'cuda:2' does not exist; the last GPU that PyTorch finds is cuda:1"
    ):
        pick_device("cuda:2")


@pytest.mark.cuda
def test_a_gpu_is_picked_and_its_memory_measured(gpu):
    assert pick_device() == pick_device("cuda") == torch.device("cuda") and pick_device("cuda:0") == gpu
    torch.cuda.empty_cache()  # a larger cached block would count as a whole
    before = memory_in_use(gpu)
    reset_peak_memory(gpu)
    large = torch.empty(2**24, device=gpu)
    assert memory_in_use(gpu) - before == large.numel() * 4
    del large
    assert memory_in_use(gpu) == before and peak_memory(gpu, before) == 2**26
