"""Malformed and damaged shards are refused in one sentence; large shards are read in little memory."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from neko_lean.cache.format import Manifest, Shard
from neko_lean.cache.manifest import write_manifest
from neko_lean.cache.reader import TeacherCache
from neko_lean.errors import CacheError
from neko_lean.outputs.signing import file_sha256
from tests.cache.reading import read_everything
from tests.helpers import encoded, resign

SHARD = "shard-00000-of-00001.safetensors"

# Prints by how many bytes RssAnon, the memory of the process without memory-mapped files, grows as the cache is read.
READ_ALL = """
import sys
from neko_lean.cache.reader import TeacherCache
from neko_lean.data.examples import EncodedExample, Example

def anonymous_memory():
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

reader = TeacherCache(sys.argv[1])
rows = [row for shard in reader.manifest.shards for row in shard.rows]
examples = [EncodedExample(Example(row_id, "", "", ""), [0] * length, 0, 0) for row_id, length, _ in rows]
reader.read(examples[:16])
before = anonymous_memory()
for start in range(0, len(examples), 16):
    reader.read(examples[start : start + 16])
print(anonymous_memory() - before)
"""


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=120)
def test_malformed_shards(small, tmp_path_factory, data):
    folder, _, examples = small
    damaged = tmp_path_factory.mktemp("fuzz") / "c"
    shutil.copytree(folder, damaged)
    path = damaged / data.draw(st.sampled_from([SHARD, SHARD.replace("shard", "forget")]))
    if data.draw(st.booleans()):  # numbers that the writer does not write
        tensors = load_file(path)
        name = data.draw(st.sampled_from(sorted(tensors)))
        array = tensors[name].copy()
        kind = data.draw(st.sampled_from(["value", "shorter", "dtype", "gone", "shape"]))
        if kind == "value":
            choices = [-(2**62), -1, 0, 1, 3, 2**15, 60000, 2**62, float("nan"), float("inf"), -float("inf"), -3.5]
            value = data.draw(st.sampled_from(choices))
            with np.errstate(all="ignore"):
                array[data.draw(st.integers(0, len(array) - 1))] = np.array(value).astype(array.dtype)
        elif kind == "shorter":
            array = array[:-1]
        elif kind == "dtype":
            array = array.astype(np.float64)
        elif kind == "shape":
            array = array[None]
        tensors[name] = array
        if kind == "gone":
            del tensors[name]
        save_file(tensors, path)
    else:  # bytes that no safetensors file has
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, min(len(raw), 400) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else raw)
    resign(damaged)
    read_everything(damaged, examples)
    shutil.rmtree(damaged.parent)


def test_an_unchanged_cache_can_be_read_and_a_linked_shard_cannot(small, tmp_path):
    folder, _, examples = small
    assert read_everything(folder, examples)
    damaged = shutil.copytree(folder, tmp_path / "c")
    (damaged / SHARD).rename(tmp_path / "elsewhere")
    (damaged / SHARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="missing"):
        TeacherCache(damaged).read(examples[0][:1])


def test_the_error_says_what_is_damaged(world, cache, tmp_path):
    def broken(name):
        folder = shutil.copytree(cache, tmp_path / name)
        return folder, folder / "shard-00000-of-00001.safetensors"

    folder, shard = broken("flip")
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="checksum"):
        TeacherCache(folder).read(encoded(world)[:1])
    folder, shard = broken("gone")
    shard.unlink()
    with pytest.raises(CacheError, match="missing"):
        TeacherCache(folder).read(encoded(world)[:1])
    folder, shard = broken("wrong")
    tensors = load_file(shard)
    tensors["ids"][:] = 65535
    save_file(tensors, shard)
    resign(folder)
    with pytest.raises(CacheError, match="token id 65535 is not in the vocabulary"):
        TeacherCache(folder).read(encoded(world)[:1])
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, words in [
        ({"shards": None}, "wrong type"),
        ({"shards": [{**manifest["shards"][0], "file": "../x"}]}, "not shard-00000-of-00001"),
        ({"weights": None}, "weights"),
        ({"mass": float("nan")}, "mass"),
        ({"rows": 7}, "not those of the shards"),
        ({"format_version": 7, "written_by": "9.9"}, r"9\.9"),
    ]:
        resign(folder, **{**manifest, **change})
        with pytest.raises(CacheError, match=words):
            TeacherCache(folder)
    for text, words in [("{", "JSON"), ("[]", "object"), ("[" * 10**5, "JSON")]:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CacheError, match=words):
            TeacherCache(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheError, match="not a complete"):
        TeacherCache(folder)
    with pytest.raises(CacheError, match="does not exist"):
        TeacherCache(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_a_gigabyte_uses_little_memory(tmp_path):
    """1 GB in 16 shards, which are hard links to the same file; every position is read and checked."""
    k, length, rows, shards = 64, 512, 488, 16
    n = length * rows
    rng = np.random.default_rng(0)
    p = np.sort(1 - rng.random((n, k), dtype=np.float32))[:, ::-1]
    p = p / p.sum(1, keepdims=True) * 0.9
    first = rng.integers(0, 50000, (n, 1))
    tensors = {
        "offsets": np.arange(n + 1, dtype=np.int64) * k,
        "ids": (first + np.arange(k)).astype(np.uint16).reshape(-1),
        "scaled_p": (p * 2.0**15).astype(np.float16).reshape(-1),
        "tail_logp": np.full(n, np.log(0.1), dtype=np.float32),
    }
    listed = []
    for number in range(shards):
        file = f"shard-{number:05d}-of-{shards:05d}.safetensors"
        if number:
            (tmp_path / file).hardlink_to(tmp_path / listed[0].file)
        else:
            save_file(tensors, tmp_path / file)
        digest = listed[0].sha256 if number else file_sha256(tmp_path / file)
        ids = [(f"{number}-{row}qa0", length, "") for row in range(rows)]
        listed.append(Shard(file, (tmp_path / file).stat().st_size, digest, ids))
    del tensors, p, first
    total = n * shards
    write_manifest(
        tmp_path / "manifest.json",
        Manifest("0", "m", "w", "t", "plain", length, k, 1.0, 50304, "float32", 8192, "float16", rows * shards, total,
                 total * k, 0, 0.9, listed, config={}),
    )  # fmt: skip
    assert sum(shard.bytes for shard in listed) > 10**9
    # Measured in a separate process, because memory that earlier tests allocated can be freed or reused in this one.
    read = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    grown = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 50e6
