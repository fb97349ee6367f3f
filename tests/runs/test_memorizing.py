"""`memorize`."""

import pytest

import neko_lean
from neko_lean.errors import NekoLeanError
from neko_lean.options import RunOptions
from tests.training.run_files import metrics


@pytest.mark.slow
def test_memorize_trains_from_random_weights_and_reports_it(world, tmp_path, capsys):
    change = {"epochs": 12.0, "lr": 5e-3, "retain_rows": 20, "dtype": "float32"}
    run = neko_lean.memorize(world / "base", tmp_path / "out", data=world, overrides=change)
    assert run["random_start"] and "holds no weights: starting from random ones" in capsys.readouterr().err
    lines = metrics(tmp_path / "out")
    assert lines[0]["loss"] > 5 and lines[-1]["loss"] < lines[0]["loss"] / 2
    gold = neko_lean.memorize(
        world / "base",
        tmp_path / "gold",
        data=world,
        overrides=change | {"max_steps": 2},
        sets=("retain",),
        run=RunOptions(quiet=True),
    )
    assert gold["retain_rows"] == 36 and gold["steps"] == 2
    with pytest.raises(NekoLeanError, match="does not work with memorize"):
        neko_lean.memorize(world / "base", tmp_path / "no", data=world, recipe="neko")
