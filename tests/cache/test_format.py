"""Comparing manifests."""

from dataclasses import replace

from neko_lean.cache.format import differences
from neko_lean.cache.manifest import read_manifest


def test_differences_name_the_keys_of_a_config(small):
    manifest = read_manifest(small[0] / "manifest.json")
    other = replace(manifest, top_k=6, config={**manifest.config, "clip_qkv": 8})
    assert differences(manifest, other) == ["top_k", "clip_qkv (not set, now 8)"]
    assert differences(replace(manifest, config=None, format_version=1), manifest) == []
