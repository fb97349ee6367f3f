"""Malformed manifests and shards, signed as if they were honest: a CacheError in one sentence, or right numbers."""

import copy
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from neko_lean.cache import TeacherCache, cache_teacher, inspect_cache
from neko_lean.cache.format import CacheError, read_manifest, write_manifest
from neko_lean.data import encode, read_rows
from neko_lean.modeling import load_tokenizer
from tests.helpers import resign

SHARD = "shard-00000-of-00001.safetensors"
FAST = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
junk = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "shard-00000-of-00001.safetensors/../x", "\x00"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def small(world, model, tmp_path_factory):
    """A small cache with forget rows, its manifest, and the rows that read it."""
    folder = tmp_path_factory.mktemp("small") / "cache"
    cache_teacher(model, world, folder, forget=world, top_k=5, max_length=12, quiet=True, format="neko")
    tokenizer = load_tokenizer(model)
    rows = [encode(read_rows(world, name), tokenizer, "neko", 12) for name in ("retain", "forget")]
    return folder, json.loads((folder / "manifest.json").read_text()), rows


def read_everything(folder, rows):
    """Read all rows; whatever comes back must be distributions over known tokens."""
    retain, forget = rows
    try:
        cache = TeacherCache(folder)
        for one in retain:
            ids, logp, tail = cache.read([one])
            assert len(tail) == len(one) and ids.min() >= 0 and ids.max() < cache.manifest.vocab_size
            total = logp.double().exp().sum(1) + tail.double().exp()
            assert ((total - 1).abs() < 1e-3).all()
        assert all((cache.target_logp(one) <= 1e-6).all() for one in forget)
        inspect_cache(folder, verify=True)
    except CacheError as error:
        assert str(error).strip() and "\n" not in str(error)
        return False
    return True


def paths(value, at=()):
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*at, key))


@given(data=st.data())
@FAST
def test_malformed_manifests(small, tmp_path_factory, data):
    folder, manifest, rows = small
    changed = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from([p for p in paths(changed) if p]))
        inner = changed
        for key in way:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[last] = data.draw(junk)
        else:
            del inner[last]
    other = tmp_path_factory.mktemp("fuzz") / "c"
    shutil.copytree(folder, other)
    resign(other, **changed) if set(changed) == set(manifest) else (other / "manifest.json").write_text(
        json.dumps(changed)
    )
    read_everything(other, rows)
    shutil.rmtree(other.parent)


@given(data=st.data())
@FAST
def test_malformed_shards(small, tmp_path_factory, data):
    folder, _, rows = small
    other = tmp_path_factory.mktemp("fuzz") / "c"
    shutil.copytree(folder, other)
    path = other / data.draw(st.sampled_from([SHARD, SHARD.replace("shard", "forget")]))
    if data.draw(st.booleans()):  # numbers that a writer would not write
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
    resign(other)
    read_everything(other, rows)
    shutil.rmtree(other.parent)


def test_an_untouched_cache_reads_and_a_link_out_of_the_folder_does_not(small, tmp_path):
    folder, _, rows = small
    assert read_everything(folder, rows)
    other = shutil.copytree(folder, tmp_path / "c")
    (other / SHARD).rename(tmp_path / "elsewhere")
    (other / SHARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="missing"):
        TeacherCache(other).read(rows[0][:1])


def test_a_manifest_is_read_back_as_it_was_written(small, tmp_path):
    manifest = read_manifest(small[0] / "manifest.json")
    write_manifest(tmp_path / "manifest.json", manifest)
    assert (tmp_path / "manifest.json").read_bytes() == (small[0] / "manifest.json").read_bytes()
    assert read_manifest(tmp_path / "manifest.json") == manifest
