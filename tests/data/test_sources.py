"""Which file a path refers to."""

import pytest

from neko_lean.data.sources import find_data_file
from neko_lean.errors import NekoLeanError


def test_a_split_of_tofu_is_found_under_its_own_names(tmp_path):
    for name in ("forget01", "retain99", "forget10", "retain90", "forget10_perturbed"):
        (tmp_path / f"{name}.json").write_text("[]")
    found = [find_data_file(tmp_path, stem, "forget01").name for stem in ("forget", "retain")]
    assert found == ["forget01.json", "retain99.json"]
    assert find_data_file(tmp_path, "retain", "forget10").name == "retain90.json"
    with pytest.raises(NekoLeanError, match=r"no forget_forget05\.parquet"):
        find_data_file(tmp_path, "forget", "forget05")

    (tmp_path / "forget_forget01.csv").touch()  # a name that is meant literally comes first
    assert find_data_file(tmp_path, "forget", "forget01").name == "forget_forget01.csv"
