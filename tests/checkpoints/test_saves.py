"""Saves: what is written is read back; saves of other versions and unreadable ones are kept."""

import errno
import json
from dataclasses import asdict

import pytest
import torch

from neko_lean.checkpoints import sealing
from neko_lean.checkpoints.run_state import RunState
from neko_lean.checkpoints.saves import read_save, write_save
from neko_lean.checkpoints.sealing import seal
from neko_lean.errors import NekoLeanError
from tests.checkpoints.interrupted import EVALUATED, result, saved, steps_saved


def test_a_save_is_read_as_it_was_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    weights, state = {"w": torch.arange(3.0)}, RunState(7, step=5)
    header = {"identity": {"seed": 1}, "versions": {"torch": "2"}}
    write_save(tmp_path / "save", weights, {}, header, state, tmp_path / "metrics.jsonl")
    save = read_save(tmp_path / "save")
    assert asdict(save.state) == asdict(state) and save.identity == {"seed": 1} and save.versions == {"torch": "2"}
    assert torch.equal(save.tensors("weights")["w"], weights["w"])
    assert len(save.tensors("state")) == 0


def other_format(save):
    """A save of a later version, with correct checksums."""
    state = json.loads((save / "state.json").read_text()) | {"format_version": 9, "versions": {"neko-lean": "9.9"}}
    (save / "state.json").write_text(json.dumps(state))
    (save / "manifest.json").unlink()
    seal(save)


def other_manifest(save):
    """A save of a later version that signs its manifests in another way."""
    state = json.loads((save / "state.json").read_text()) | {"format_version": 9}
    (save / "state.json").write_text(json.dumps(state))
    (save / "manifest.json").write_text('{"signature": "abc"}')


def other_state(save):
    """A save of a version with the same format number but one more key."""
    state = json.loads((save / "state.json").read_text())
    state["state"]["mood"] = 1
    (save / "state.json").write_text(json.dumps(state))
    (save / "manifest.json").unlink()
    seal(save)


@pytest.mark.slow
@pytest.mark.parametrize("change", [other_format, other_manifest, other_state])
def test_a_save_of_another_version_is_refused_and_kept(unlearn, killed_run, out, change):
    change(saved(out) / "step-00000006")
    before = {path: path.stat().st_size for path in saved(out).rglob("*")}
    message = "written by another version" if change is other_state else "format version 9, written by neko-lean"
    with pytest.raises(NekoLeanError, match=message):
        unlearn(out, EVALUATED, resume=True)
    assert {path: path.stat().st_size for path in saved(out).rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_a_save_that_cannot_be_read_is_refused_and_kept(unlearn, killed_run, out, monkeypatch, number):
    read = sealing.file_sha256

    def failing(path):
        if path.name == "weights-000.safetensors" and "step-00000006" in str(path):
            raise OSError(number, "Input/output trouble", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(sealing, "file_sha256", failing)
        with pytest.raises(NekoLeanError, match=r"Input/output trouble.*fix that and run again"):
            unlearn(out, EVALUATED, resume=True)
    assert steps_saved(out) == [3, 6]
    unlearn(out, EVALUATED, resume=True)
    assert result(out) == result(killed_run / "whole")
