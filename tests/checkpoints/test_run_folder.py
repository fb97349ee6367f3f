"""Which saves a run writes and continues from: damaged ones are detected, and a full disk keeps earlier ones."""

import errno
import json
import subprocess

import pytest

from neko_lean.checkpoints import tensors as tensor_files
from neko_lean.checkpoints.saves import best_step
from neko_lean.errors import NekoLeanError
from neko_lean.training import loop
from tests.checkpoints.interrupted import EVALUATED, Killed, kill_at, result, save_of, saved, steps_saved

pytestmark = pytest.mark.slow  # each test is one or more whole runs


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip, halve, lambda path: path.unlink()], ids=["flipped", "cut", "missing"])
@pytest.mark.parametrize("file", ["weights-000.safetensors", "state.json", "metrics.jsonl", "manifest.json", "best"])
def test_a_damaged_save_is_detected_and_the_previous_one_used(unlearn, killed_run, out, capsys, harm, file):
    save = saved(out) / "step-00000006"
    best = saved(out) / f"best-{best_step(save):08d}"
    alone = best.name != f"best-{best_step(save.with_name('step-00000003')):08d}"
    harm(best / "weights-000.safetensors" if file == "best" else save / file)
    unlearn(out, EVALUATED, resume=True, quiet=False)
    err = capsys.readouterr().err
    assert "the run continues from the previous save" in err and f"{save} is damaged (" in err
    # If both saves have the same best checkpoint, its damage affects both.
    assert ("resuming from step 3" if alone or file != "best" else "starting from step 0") in err
    assert result(out) == result(killed_run / "whole")


def test_with_both_saves_damaged_it_starts_from_the_beginning(unlearn, killed_run, out, capsys):
    for save in saved(out).glob("step-*"):
        flip(save / "state-000.safetensors")
    unlearn(out, EVALUATED, resume=True, quiet=False)
    err = capsys.readouterr().err
    assert err.count("does not match") == 2 and "the run starts from the beginning" in err and "there is no save" in err
    assert result(out) == result(killed_run / "whole")


def test_a_damaged_save_is_renamed_not_removed(unlearn, killed_run, out, monkeypatch):
    flip(saved(out) / "step-00000006" / "state-000.safetensors")
    for number in range(2):  # the second time, the name is taken
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, 7)
            unlearn(out, EVALUATED, resume=True, save_every=3)
        if number == 0:
            flip(saved(out) / "step-00000006" / "state-000.safetensors")
    names = sorted(path.name for path in saved(out).glob("damaged-*"))
    assert names == ["damaged-step-00000006", "damaged-step-00000006-2"]
    unlearn(out, EVALUATED, resume=True)
    assert result(out) == result(killed_run / "whole")


def full(monkeypatch, at):
    """Let the disk be full when file number `at` of the saves' tensors is written."""
    original, count = tensor_files.save_file, [0]

    def failing(tensors, path):
        count[0] += 1
        if count[0] == at:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(tensor_files, "save_file", failing)


def test_a_full_disk_keeps_the_last_save_and_ends_in_one_sentence(unlearn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full(patch, 6)  # the second of two files of the third save
        with pytest.raises(NekoLeanError, match=r"^No space left .*as of step 4: continue with --resume\.$"):
            unlearn(out, save_every=2)
    assert steps_saved(out) == [2, 4] and not list(saved(out).glob(".step*"))
    unlearn(out, resume=True, save_every=2)
    unlearn(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


def test_a_full_disk_before_the_first_save_leaves_nothing(unlearn, tmp_path, monkeypatch):
    full(monkeypatch, 1)
    with pytest.raises(NekoLeanError, match=r"^No space left"):
        unlearn(tmp_path / "out", save_every=2)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_metrics_are_written(unlearn, tmp_path, monkeypatch):
    def dumps(line, **options):
        if line["step"] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return json.dumps(line, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "json", type("Full", (), {"dumps": staticmethod(dumps)}))
        with pytest.raises(NekoLeanError, match=r"^No space left .*as of step 4: continue with --resume\.$"):
            unlearn(out, save_every=2)
    unlearn(out, resume=True)
    unlearn(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


def test_a_disk_that_really_is_full(unlearn, tmp_path):
    """On a file system that holds two saves and not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(tensor.numel() * (2 + 3) for tensor in save_of(unlearn, tmp_path / "probe", 2).values())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 2.5)}", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a file system here")
    try:
        with pytest.raises(NekoLeanError, match=r"^No space left .*as of step [24]: continue with --resume"):
            unlearn(disk / "out", save_every=2)
        subprocess.run(["mount", "-o", f"remount,size={size * 20}", disk], check=True)
        unlearn(disk / "out", save_every=2, resume=True)
        unlearn(tmp_path / "whole")
        assert result(disk / "out") == result(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)
