"""Malformed manifests and shards, signed as if they were honest: a CacheError in one sentence, or right numbers."""

import copy
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from neko_lean.cache import teacher, writer
from neko_lean.cache.check import inspect_cache
from neko_lean.cache.format import differences
from neko_lean.cache.manifest import checked, read_manifest, write_manifest
from neko_lean.cache.reader import TeacherCache
from neko_lean.data.examples import Example, read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import CacheError, NekoLeanError
from neko_lean.models.loading import load_tokenizer
from tests.helpers import make_cache, make_rows, resign, write_rows

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
    make_cache(model, world, folder, forget=world, top_k=5, max_length=12, format="neko")
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


def plan(manifest, **change):
    """The plan that a manifest came from, with some fields changed."""
    return replace(writer._without_results(manifest), **change)


def with_row(manifest, *row):
    """With another first row in its first shard."""
    first, *rest = manifest.shards
    return {"shards": [replace(first, rows=[row, *first.rows[1:]]), *rest]}


def test_a_plan_is_checked_by_the_rules_of_what_is_read(small):
    manifest = read_manifest(small[0] / "manifest.json")
    assert checked(plan(manifest)) == plan(manifest)
    _, positions, digest = manifest.shards[0].rows[0]
    for change, words in [
        (with_row(manifest, "a\ud800b", positions, digest), r"id of row 'a\\ud800b' holds '\\ud800'"),
        (with_row(manifest, "x", 0, digest), "row 'x' has no token"),
        (with_row(manifest, *manifest.shards[0].rows[1]), "listed twice"),
        ({"model": os.fsdecode(b"mod\xffel")}, r"the teacher's folder, 'mod\\udcffel', is not UTF-8"),
        ({"config": {"hidden_act": "\ud800"}}, "config.json holds"),
        ({"top_k": 10**20}, "--top-k is 1000"),
        ({"max_length": 10**20}, "--max-length is 1000"),
        ({"batch_tokens": 10**20}, "--batch-tokens is 1000"),
        ({"shards": [], "rows": 0, "positions": 0}, "no rows to cache"),
        ({"mass": float("nan")}, "mass is nan"),
    ]:
        with pytest.raises(CacheError, match=words) as caught:
            checked(plan(manifest, **change))
        assert str(caught.value).isascii() and "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["top_k", "max_length", "batch_tokens"])
def test_a_number_out_of_range_is_found_before_the_teacher_runs(world, model, tmp_path, monkeypatch, option):
    monkeypatch.setattr(writer, "_write_shards", lambda *_: pytest.fail("the teacher ran"))
    with pytest.raises(NekoLeanError, match=f"--{option.replace('_', '-')} is 1000"):
        make_cache(model, world, tmp_path / "cache", **{option: 10**20})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_name_that_is_not_text_is_found_before_the_teacher_runs(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_write_shards", lambda *_: pytest.fail("the teacher ran"))
    folder = tmp_path / os.fsdecode(b"mod\xffel")
    try:
        shutil.copytree(model, folder)
    except OSError:
        pytest.skip("this file system only has names that are text")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(NekoLeanError, match="not UTF-8 text: rename the folder"):
        make_cache(tmp_path / "link", world, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_row_without_a_token_is_found_before_the_teacher_runs(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_write_shards", lambda *_: pytest.fail("the teacher ran"))

    def without(rows, *arguments, **options):
        return [
            replace(one, input_ids=[]) if one.example.id == rows[1].id else one
            for one in encode(rows, *arguments, **options)
        ]

    monkeypatch.setattr(writer, "encode", without)
    with pytest.raises(NekoLeanError, match=f"row {make_rows('Rix')[1].id!r} has no token"):
        make_cache(model, world, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_says_nan_is_named_with_the_row_and_nothing_is_saved(world, model, tmp_path, monkeypatch):
    rows = [
        Example("goodqa0", "Where did Rix0 walk?", "wood", "Task1"),
        Example("badqa0", "Where does the river flow?", "to", "Task1"),
    ]
    write_rows(tmp_path / "retain.jsonl", rows)
    lengths = [len(one) for one in encode(rows, load_tokenizer(model), "plain", 512)]
    assert lengths[0] != lengths[1]
    original = teacher.hidden_states

    def broken(model, batch, pad_id):
        hidden = original(model, batch, pad_id)
        start = 0
        for one in batch:
            hidden[start] += float("nan") if one.example.id == "badqa0" else 0
            start += len(one)
        return hidden

    monkeypatch.setattr(teacher, "hidden_states", broken)
    with pytest.raises(NekoLeanError, match="row badqa0 is NaN or infinite"):
        make_cache(model, tmp_path / "retain.jsonl", tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["retain.jsonl"]


def test_differences_name_the_keys_of_a_config(small):
    manifest = read_manifest(small[0] / "manifest.json")
    other = replace(manifest, top_k=6, config={**manifest.config, "clip_qkv": 8})
    assert differences(manifest, other) == ["top_k", "clip_qkv (not set, now 8)"]
    assert differences(replace(manifest, config=None, format_version=1), manifest) == []
