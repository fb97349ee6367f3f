"""check_cache: a cache is compared with its live teacher."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from neko_lean.cache.check import check_cache
from neko_lean.cache.reader import TeacherCache
from neko_lean.errors import CacheError
from tests.helpers import resign


def test_a_good_cache_matches_its_teacher(world, confident):
    model, cache = confident
    comparison = check_cache(cache, model, 10, retain=world)
    assert 10 <= comparison["rows"] <= 36 and abs(comparison["kl_mean"]) < 1e-6
    assert 0.9 <= comparison["mass_1st_percentile"] <= comparison["mass_mean"] < 1


def test_a_cache_that_does_not_match_its_teacher_is_refused(world, confident, tmp_path):
    model, cache = confident
    folder = shutil.copytree(cache, tmp_path / "c")
    shard = next(folder.glob("shard-*"))
    tensors = load_file(shard)
    single = np.diff(tensors["offsets"]) == 1
    starts = tensors["offsets"][:-1][single]
    tensors["ids"][starts] = (tensors["ids"][starts] + 1) % 200  # another token; all sums remain right
    save_file(tensors, shard)
    resign(folder)
    TeacherCache(folder)
    with pytest.raises(CacheError, match="does not match its teacher"):
        check_cache(folder, model, 36, retain=world)
