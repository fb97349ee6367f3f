"""What is written: the fewest entries that reach the mass, the same bytes on every run and after every kill."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from neko_lean.cache import teacher as kept
from neko_lean.cache import writer
from neko_lean.cache.format import SCALE
from neko_lean.cache.reader import TeacherCache
from neko_lean.errors import CacheError, NekoLeanError
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.models.loading import load_model
from neko_lean.outputs.signing import file_sha256
from tests.helpers import encoded, live, make_cache, random_model

KILLED_AT_SYNC = """
import os, signal, sys
import torch
from neko_lean.cache import writer
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
writer.SHARD_POSITIONS = 100
make_cache(model, retain, out, forget=retain, batch_tokens=256, format="neko")
"""


def test_memory_is_one_layer_or_one_chunk_of_logits(monkeypatch, model, world):
    """Above the teacher: what its backbone needs for a layer, and never more logits than a chunk's."""
    teacher = load_model(model, torch.float32, torch.device("cpu"))
    batch = encoded(world)
    positions, vocabulary = sum(map(len, batch)), teacher.head.shape[0]
    monkeypatch.setattr(kept, "CHUNK_ELEMENTS", 64 * vocabulary)
    with LiveTensors() as backbone:
        kept.hidden_states(teacher, batch, 0)
    with LiveTensors() as live:
        kept.keep(teacher, batch, 0, 64, 0.999)
    assert live.peak <= backbone.peak + 4 * 64 * vocabulary
    assert live.largest <= max(backbone.largest, 4 * 64 * vocabulary) < 4 * positions * vocabulary


def files(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("mass", [0.7, 0.9, 0.99])
def test_a_position_keeps_the_fewest_tokens_that_reach_the_mass(world, tmp_path, mass):
    # A surer head than the other tests' models have, so that positions differ in what they need.
    model = random_model(world, tmp_path / "m", seed=4, scale=60.0)
    make_cache(model, world, tmp_path / "c", top_k=20, mass=mass, dtype="float32", format="neko")
    reader = TeacherCache(tmp_path / "c")
    sizes = []
    for one in encoded(world)[::6]:
        p = live(model, one).double().softmax(1).sort(dim=1, descending=True)[0]  # [n, V]
        _, logp, tail = reader.read([one])
        for position in range(len(one)):
            count = int((logp[position] > -torch.inf).sum())
            inside = p[position, :count].sum().item()
            assert count == 20 or inside >= mass - 1e-6
            assert count == 1 or p[position, : count - 1].sum().item() < mass + 1e-6
            assert tail[position].double().exp().item() == pytest.approx(1 - inside, abs=1e-5)
            sizes.append(count)
    assert len(set(sizes)) > 1


def test_the_same_teacher_and_rows_give_the_same_bytes_in_many_shards(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_POSITIONS", 100)
    for name in ("a", "b"):
        manifest = make_cache(model, world, tmp_path / name, top_k=3, mass=1, batch_tokens=256, format="neko")
    assert len(manifest.shards) > 3
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sorted(files(tmp_path / "a")) == ["manifest.json", *(s.file for s in manifest.shards)]
    reader = TeacherCache(tmp_path / "a")
    one = encoded(world)[0]
    torch.testing.assert_close(
        reader.read([one])[2].exp(),
        1 - live(model, one, torch.bfloat16).float().softmax(1).topk(3, 1)[0].sum(1),
        rtol=0.1,
        atol=0.03,
    )
    assert manifest.positions == sum(len(e) for e in encoded(world))
    assert 0 < manifest.mean_mass <= 1


def test_a_failed_run_leaves_nothing_and_an_old_cache_stays(world, model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    make_cache(model, world, out, top_k=2, format="neko")
    before = files(out)
    with pytest.raises(NekoLeanError, match="--overwrite"):
        make_cache(model, world, out, format="neko")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_atomically", full)
    with pytest.raises(NekoLeanError, match="No space left"):
        make_cache(model, world, out, overwrite=True, format="neko")
    assert files(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def whole(world, model, tmp_path_factory):
    """The files of a run that nobody interrupted, with a shard for about every batch."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_POSITIONS", 100)
        make_cache(model, world, out, forget=world, batch_tokens=256, format="neko")
    return files(out)


def resume(world, model, out, monkeypatch, **change):
    monkeypatch.setattr(writer, "SHARD_POSITIONS", 100)
    options = {"forget": world, "batch_tokens": 256, "resume": True}
    return make_cache(model, world, out, **{**options, **change}, format="neko")


def test_a_full_disk_keeps_what_was_complete_and_resume_ends_in_the_same_bytes(
    world, model, whole, tmp_path, monkeypatch, capsys
):
    out, calls = tmp_path / "cache", itertools.count()

    def full_later(path, data, original=writer.write_atomically):
        if path.suffix == ".safetensors" and next(calls) == 3:
            raise OSError(28, "No space left on device")
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "SHARD_POSITIONS", 100)
        patch.setattr(writer, "write_atomically", full_later)
        with pytest.raises(NekoLeanError, match="No space left"):
            make_cache(model, world, out, forget=world, batch_tokens=256, format="neko")
    assert not out.exists() and "--resume" in capsys.readouterr().err
    assert len(list((tmp_path / ".cache.partial").glob("*.safetensors"))) == 3
    with pytest.raises(NekoLeanError, match="--resume, or start anew with --overwrite"):
        make_cache(model, world, out, format="neko")
    with pytest.raises(CacheError, match="begun with another top_k"):
        resume(world, model, out, monkeypatch, top_k=5)
    ran = []
    with monkeypatch.context() as patch:
        patch.setattr(writer, "keep", lambda *args, original=writer.keep: ran.append(1) or original(*args))
        resume(world, model, out, monkeypatch)
    assert files(out) == whole and len(ran) < len(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    # A complete cache has nothing to go on with; another one's settings are named.
    resume(world, model, out, monkeypatch)
    with pytest.raises(CacheError, match="begun with another mass"):
        resume(world, model, out, monkeypatch, mass=0.5)
    assert files(out) == whole


def test_a_cache_that_cannot_be_read_back_is_not_published(world, model, whole, tmp_path, monkeypatch):
    """The disk loses a bit between writing and reading: checksums are those of what was made."""
    out, write = tmp_path / "cache", writer.write_atomically

    def rotten(path, data):
        write(path, data)
        if path.name.startswith("shard-00001-") and path.suffix == ".safetensors":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_atomically", rotten)
        with pytest.raises(CacheError, match=r"shard-00001-.* is damaged"):
            resume(world, model, out, monkeypatch)
    assert not out.exists() and (tmp_path / ".cache.partial").is_dir()
    resume(world, model, out, monkeypatch)
    assert files(out) == whole


@pytest.mark.parametrize("at", [1, 4, "manifest", "last"])
def test_killed_at_any_write_and_resumed_ends_in_the_same_bytes(world, model, whole, tmp_path, monkeypatch, at):
    """kill -9 just before the nth fsync, in a process of its own; bench/kill.py does it at random moments."""
    syncs = 2 + 4 * (len(whole) - 1) + 3 + 1  # plan, two a shard and two a record, manifest and its folder, end, move
    number = {"manifest": syncs - 3, "last": syncs}.get(at, at)
    out = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED_AT_SYNC, str(model), str(world), str(out), str(number)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert out.exists() == (at == "last")
    resume(world, model, out, monkeypatch)
    assert files(out) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_float16_is_within_a_thousandth_of_float32(world, model, tmp_path):
    read = {}
    for stored in ("float16", "float32"):
        make_cache(model, world, tmp_path / stored, stored_dtype=stored, dtype="float32", format="neko")
        read[stored] = TeacherCache(tmp_path / stored).read(encoded(world))
    (ids, half, tail), (same_ids, single, same_tail) = read.values()
    assert torch.equal(ids, same_ids) and torch.equal(tail, same_tail)
    counts = single > np.log(2e-9)  # smaller ones are subnormal in float16, and weigh nothing
    error = ((half - single).exp() - 1).abs()[counts]
    assert 1e-5 < error.max() < 1e-3


def test_a_teacher_that_is_too_flat_is_warned_about(world, model, tmp_path, capsys):
    manifest = make_cache(model, world, tmp_path / "c", top_k=1, format="neko")
    assert manifest.mean_mass < 0.9
    assert f"{manifest.mean_mass:.3f} of the teacher's probability" in capsys.readouterr().err


def test_stored_arrays_are_as_FORMAT_md_says(cache):
    tensors = load_file(cache / "shard-00000-of-00001.safetensors")
    manifest = json.loads((cache / "manifest.json").read_text())
    offsets, ids, p, tail = (tensors[name] for name in ("offsets", "ids", "scaled_p", "tail_logp"))
    assert [a.dtype for a in (offsets, ids, p, tail)] == [np.int64, np.uint16, np.float16, np.float32]
    assert offsets[0] == 0 and offsets[-1] == len(ids) == len(p) == manifest["entries"]
    assert len(offsets) == len(tail) + 1 == manifest["positions"] + 1
    for start, stop in itertools.pairwise(offsets):
        assert len(set(ids[start:stop])) == stop - start
        assert (np.diff(p[start:stop].astype(np.float32)) <= 0).all()
    assert ids.max() < manifest["vocab_size"] and p.max() <= SCALE
