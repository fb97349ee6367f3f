"""Tensors of a save."""

import pytest
import torch

from neko_lean.checkpoints import tensors as tensor_files
from neko_lean.checkpoints.tensors import StoredTensors, write_tensors


def test_large_tensors_are_written_to_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 100)
    tensors = {f"t{n}": torch.full((n,), float(n)) for n in (1, 20, 30, 3, 2)}
    write_tensors(tmp_path, "weights", tensors)
    files = sorted(tmp_path.glob("weights-*"))
    assert len(files) == 3
    stored = StoredTensors(files, "")
    assert set(stored) == set(tensors) and all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_a_prefix_selects_tensors_and_is_removed(tmp_path):
    write_tensors(tmp_path, "state", {"random.host": torch.ones(2), "optimizer.step": torch.tensor(3)})
    stored = StoredTensors(sorted(tmp_path.iterdir()), "random.")
    assert list(stored) == ["host"] and len(stored) == 1
    with pytest.raises(KeyError):
        stored["step"]
