"""Manifests: written and read back unchanged, and plans that no manifest can hold."""

import os
from dataclasses import replace

import pytest

from neko_lean.cache.format import without_results
from neko_lean.cache.manifest import read_manifest, validate_plan, write_manifest
from neko_lean.errors import CacheError


def test_a_manifest_is_read_back_unchanged(small, tmp_path):
    manifest = read_manifest(small[0] / "manifest.json")
    write_manifest(tmp_path / "manifest.json", manifest)
    assert (tmp_path / "manifest.json").read_bytes() == (small[0] / "manifest.json").read_bytes()
    assert read_manifest(tmp_path / "manifest.json") == manifest


def plan(manifest, **change):
    """The plan that a manifest was made from, with some fields changed."""
    return replace(without_results(manifest), **change)


def with_row(manifest, *row):
    """A change that replaces the first row of the first shard."""
    first, *rest = manifest.shards
    return {"shards": [replace(first, rows=[row, *first.rows[1:]]), *rest]}


def test_validate_plan_refuses_what_cannot_be_read_back(small):
    manifest = read_manifest(small[0] / "manifest.json")
    assert validate_plan(plan(manifest)) == plan(manifest)
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
            validate_plan(plan(manifest, **change))
        assert str(caught.value).isascii() and "\n" not in str(caught.value)
