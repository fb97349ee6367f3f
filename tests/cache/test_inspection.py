"""inspect_cache: its numbers, and that --verify finds every flipped byte, other files and wrong totals."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from neko_lean.cache.inspection import inspect_cache
from neko_lean.errors import CacheError
from tests.helpers import resign


def test_the_numbers_match_the_stored_arrays(confident):
    _, cache = confident
    about = inspect_cache(cache, verify=True)
    tensors = load_file(next(cache.glob("shard-*")))
    sizes = np.diff(tensors["offsets"])
    p, tail = tensors["scaled_p"].astype(np.float64) / 2**15, tensors["tail_logp"].astype(np.float64)
    assert about["bytes_per_token"] == next(cache.glob("shard-*")).stat().st_size / len(sizes)
    assert about["mean_entries"] == pytest.approx(sizes.mean())
    assert about["mean_tail_mass"] == pytest.approx(np.exp(tail).mean(), rel=1e-6)
    assert about["mean_tail_mass"] == pytest.approx(1 - about["mean_mass"], rel=1e-6)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum() - (np.exp(tail) * tail).sum()
    assert about["mean_entropy"] == pytest.approx(entropy / len(sizes), rel=1e-5)
    histogram = about["entries_per_token"]
    assert sum(histogram.values()) == pytest.approx(1)
    assert histogram["1"] == pytest.approx((sizes == 1).mean())
    assert histogram["3-4"] == pytest.approx(((sizes == 3) | (sizes == 4)).mean())
    assert about["forget_shards"][0]["rows"] == 2 * 24  # each forget example and its refusal


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=60)
@pytest.mark.parametrize(
    "name", ["manifest.json", "shard-00000-of-00001.safetensors", "forget-00000-of-00001.safetensors"]
)
def test_verify_finds_every_flipped_byte_and_names_its_file(confident, tmp_path_factory, name, position, flip):
    _, cache = confident
    folder = tmp_path_factory.mktemp("flip") / "c"
    shutil.copytree(cache, folder)
    data = bytearray((folder / name).read_bytes())
    data[int(position * len(data))] ^= flip
    (folder / name).write_bytes(data)
    with pytest.raises(CacheError, match=name):
        inspect_cache(folder, verify=True)
    shutil.rmtree(folder.parent)


def test_verify_finds_other_files_and_wrong_totals(confident, tmp_path):
    _, cache = confident
    folder = shutil.copytree(cache, tmp_path / "c")
    (folder / "note.txt").touch()
    with pytest.raises(CacheError, match=r"note\.txt"):
        inspect_cache(folder, verify=True)
    (folder / "note.txt").unlink()
    resign(folder, entries=5)
    with pytest.raises(CacheError, match="entries"):
        inspect_cache(folder, verify=True)
