"""Malformed manifests with right checksums: refused in one sentence, or read as valid distributions."""

import copy
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.reading import read_everything
from tests.helpers import resign

junk = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "shard-00000-of-00001.safetensors/../x", "\x00"]),
)  # fmt: skip


def paths(value, at=()):
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*at, key))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=120)
def test_malformed_manifests(small, tmp_path_factory, data):
    folder, manifest, examples = small
    changed = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 2))):
        *keys, last = data.draw(st.sampled_from([p for p in paths(changed) if p]))
        parent = changed
        for key in keys:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[last] = data.draw(junk)
        else:
            del parent[last]
    copied = tmp_path_factory.mktemp("fuzz") / "c"
    shutil.copytree(folder, copied)
    resign(copied, **changed) if set(changed) == set(manifest) else (copied / "manifest.json").write_text(
        json.dumps(changed)
    )
    read_everything(copied, examples)
    shutil.rmtree(copied.parent)
