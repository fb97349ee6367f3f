"""inspect, --verify and --check: numbers by hand, every flipped byte, a cache that says what its teacher does not."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from neko_lean.cache.check import check_cache, inspect_cache
from neko_lean.cache.reader import TeacherCache
from neko_lean.errors import CacheError
from tests.helpers import make_cache, random_model, resign


@pytest.fixture(scope="module")
def sure(world, tmp_path_factory):
    """A sure teacher and its ragged cache, forget rows included."""
    folder = tmp_path_factory.mktemp("sure")
    model = random_model(world, folder / "model", seed=4, scale=60.0)
    make_cache(model, world, folder / "cache", forget=world, mass=0.9, dtype="float32", format="neko")
    return model, folder / "cache"


def test_inspect_counts_what_is_there(sure):
    _, cache = sure
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
    assert about["forget_shards"][0]["rows"] == 2 * 24  # and a refusal of each


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize(
    "name", ["manifest.json", "shard-00000-of-00001.safetensors", "forget-00000-of-00001.safetensors"]
)
def test_every_flipped_byte_is_found_and_its_file_named(sure, tmp_path_factory, name, place, flip):
    _, cache = sure
    folder = tmp_path_factory.mktemp("flip") / "c"
    shutil.copytree(cache, folder)
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data))] ^= flip
    (folder / name).write_bytes(data)
    with pytest.raises(CacheError, match=name):
        inspect_cache(folder, verify=True)
    shutil.rmtree(folder.parent)


def test_verify_names_strangers_and_false_totals(sure, tmp_path):
    _, cache = sure
    folder = shutil.copytree(cache, tmp_path / "c")
    (folder / "note.txt").touch()
    with pytest.raises(CacheError, match=r"note\.txt"):
        inspect_cache(folder, verify=True)
    (folder / "note.txt").unlink()
    resign(folder, entries=5)
    with pytest.raises(CacheError, match="entries"):
        inspect_cache(folder, verify=True)


def test_check_finds_no_difference_in_a_good_cache(world, sure):
    model, cache = sure
    found = check_cache(cache, model, world, 10)
    assert 10 <= found["rows"] <= 36 and abs(found["kl_mean"]) < 1e-6
    assert 0.9 <= found["mass_1st_percentile"] <= found["mass_mean"] < 1


def test_check_fails_when_the_cache_says_what_the_teacher_does_not(world, sure, tmp_path):
    model, cache = sure
    folder = shutil.copytree(cache, tmp_path / "c")
    shard = next(folder.glob("shard-*"))
    tensors = load_file(shard)
    one = np.diff(tensors["offsets"]) == 1
    starts = tensors["offsets"][:-1][one]
    tensors["ids"][starts] = (tensors["ids"][starts] + 1) % 200  # another token, and all sums still right
    save_file(tensors, shard)
    resign(folder)
    TeacherCache(folder)
    with pytest.raises(CacheError, match="not what its teacher says"):
        check_cache(folder, model, world, 36)
