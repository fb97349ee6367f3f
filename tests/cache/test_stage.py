"""Runs that fail or are killed: what they leave, and that a resumed run ends in the same bytes."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neko_lean.cache import planning, records, writer
from neko_lean.errors import CacheError, NekoLeanError
from neko_lean.outputs.signing import file_sha256
from tests.helpers import make_cache

KILLED_AT_SYNC = """
import os, signal, sys
import torch
from neko_lean.cache import planning
from tests.helpers import make_cache
torch.set_num_threads(2)
model, retain, out, at = sys.argv[1:]
calls = 0
def fsync(file, original=os.fsync):
    global calls
    calls += 1
    if calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    original(file)
os.fsync = fsync
planning.SHARD_POSITIONS = 100
make_cache(model, retain, out, forget=retain, batch_tokens=256, format="neko")
"""


def checksums(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir())}


def test_a_failed_run_leaves_no_files_and_keeps_the_old_cache(world, model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    make_cache(model, world, out, top_k=2, format="neko")
    before = checksums(out)
    with pytest.raises(NekoLeanError, match="--overwrite"):
        make_cache(model, world, out, format="neko")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_atomically", fail)
    with pytest.raises(NekoLeanError, match="No space left"):
        make_cache(model, world, out, overwrite=True, format="neko")
    assert checksums(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def whole(world, model, tmp_path_factory):
    """The checksums of a run that was not interrupted, with about one shard per batch."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SHARD_POSITIONS", 100)
        make_cache(model, world, out, forget=world, batch_tokens=256, format="neko")
    return checksums(out)


def resume(world, model, out, monkeypatch, **change):
    monkeypatch.setattr(planning, "SHARD_POSITIONS", 100)
    options = {"forget": world, "batch_tokens": 256, "resume": True}
    return make_cache(model, world, out, **{**options, **change}, format="neko")


def test_complete_shards_survive_a_full_disk_and_resume_ends_in_the_same_bytes(
    world, model, whole, tmp_path, monkeypatch, capsys
):
    out, calls = tmp_path / "cache", itertools.count()

    def fail_at_fourth_shard(path, data, original=records.write_atomically):
        if path.suffix == ".safetensors" and next(calls) == 3:
            raise OSError(28, "No space left on device")
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(planning, "SHARD_POSITIONS", 100)
        patch.setattr(records, "write_atomically", fail_at_fourth_shard)
        with pytest.raises(NekoLeanError, match="No space left"):
            make_cache(model, world, out, forget=world, batch_tokens=256, format="neko")
    assert not out.exists() and "--resume" in capsys.readouterr().err
    assert len(list((tmp_path / ".cache.partial").glob("*.safetensors"))) == 3
    with pytest.raises(NekoLeanError, match="--resume, or start anew with --overwrite"):
        make_cache(model, world, out, format="neko")
    with pytest.raises(CacheError, match="begun with another top_k"):
        resume(world, model, out, monkeypatch, top_k=5)
    calls_to_teacher = []
    with monkeypatch.context() as patch:
        patch.setattr(
            writer,
            "top_k_entries",
            lambda *args, original=writer.top_k_entries: calls_to_teacher.append(1) or original(*args),
        )
        resume(world, model, out, monkeypatch)
    assert checksums(out) == whole and len(calls_to_teacher) < len(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    # Resuming a complete cache does nothing, and names settings that differ.
    resume(world, model, out, monkeypatch)
    with pytest.raises(CacheError, match="begun with another mass"):
        resume(world, model, out, monkeypatch, mass=0.5)
    assert checksums(out) == whole


def test_a_cache_that_cannot_be_read_back_is_not_published(world, model, whole, tmp_path, monkeypatch):
    """The disk changes a bit between writing and reading. Checksums are computed before writing, so it is noticed."""
    out, write = tmp_path / "cache", records.write_atomically

    def write_with_bit_flip(path, data):
        write(path, data)
        if path.name.startswith("shard-00001-") and path.suffix == ".safetensors":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_atomically", write_with_bit_flip)
        with pytest.raises(CacheError, match=r"shard-00001-.* is damaged"):
            resume(world, model, out, monkeypatch)
    assert not out.exists() and (tmp_path / ".cache.partial").is_dir()
    resume(world, model, out, monkeypatch)
    assert checksums(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4, "manifest", "last"])
def test_a_run_killed_at_any_write_can_be_resumed_to_the_same_bytes(world, model, whole, tmp_path, monkeypatch, at):
    """SIGKILL just before the nth fsync of a subprocess. bench/kill.py kills at random moments."""
    syncs = (
        2 + 4 * (len(whole) - 1) + 3 + 1
    )  # plan, two per shard and two per record, manifest and its folder, end, move
    number = {"manifest": syncs - 3, "last": syncs}.get(at, at)
    out = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED_AT_SYNC, str(model), str(world), str(out), str(number)]
    root = Path(__file__).parents[2]
    process = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-500:]
    assert out.exists() == (at == "last")
    resume(world, model, out, monkeypatch)
    assert checksums(out) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
