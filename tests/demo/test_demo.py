"""The demo end to end on a very small world, and its copy of real rows."""

import json

import pytest

from neko_lean.data.anchor import read_anchor
from neko_lean.data.examples import read_rows
from neko_lean.demo import run as demo_run
from neko_lean.demo.real_data import copy_rows
from neko_lean.demo.run import demo
from neko_lean.jsonio import write_jsonl
from neko_lean.options import DemoOptions
from neko_lean.recipe import DEFAULT, load_recipe
from tests.helpers import LUME, make_rows, write_rows


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(demo_run, "MEMORIZE", {**demo_run.MEMORIZE, "epochs": 0.5})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_leaves_everything_it_names(world, tmp_path, fast, monkeypatch, dtype):
    monkeypatch.setattr(demo_run, "has_bfloat16", lambda device: dtype == "bfloat16")
    result = demo(tmp_path / "out", data=world, max_steps=2, run=DemoOptions(quiet=True))
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == result
    assert all((tmp_path / "out").joinpath(path).exists() for path in result["files"].values())
    for name in (DEFAULT, "neko"):
        run = json.loads((tmp_path / "out" / f"unlearned-{name}" / "run.json").read_text())
        assert run["steps"] == 2 and f"Recipe {name}, 2 steps" in result["verdict"]
        expected = {**load_recipe(name).values(), "max_steps": 2, "backward": "plain", "dtype": dtype}
        assert run["recipe"] == {**expected, "lr": run["recipe"]["lr"]}  # by the model's width, if it is "auto"
    assert list(result["scores"]) == ["before", DEFAULT, "neko"]
    for found in result["scores"].values():
        assert found["membership"]["members"] == 4 and found["final"] is None
    # Nothing in the output tells where it was made.
    for file in (tmp_path / "out").rglob("*.json"):
        assert "partial" not in file.read_text(), file


def test_official_layout_is_copied_with_its_members(tmp_path, world):
    source = tmp_path / "source"
    (source / "mia").mkdir(parents=True)
    for name in ("forget", "retain"):
        (source / f"{name}_validation.jsonl").write_text((world / f"{name}.jsonl").read_text())
    write_rows(source / "retain_train.jsonl", [*read_rows(world, "retain"), *make_rows("Anc", 2)])
    write_jsonl(source / "mia" / "nonmember.jsonl", [{"id": "1", "document": "Never seen."}])
    copy_rows(source, "validation", tmp_path / "copy")
    assert read_rows(tmp_path / "copy", "forget") == read_rows(world, "forget")
    anchor = read_anchor(tmp_path / "copy" / "anchor.jsonl")
    assert [row.task for row in anchor] == ["Task1", "Task1", "Task2", "Task2", "Task3", "Task3"]
    assert all("Anc" in row.output for row in anchor)
    members = (tmp_path / "copy" / "mia" / "member.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in members] == ["Foo0c", "Foo1c", "Foo2c", "Foo3c"]


@pytest.mark.skipif(not LUME.is_dir(), reason=f"no LUME data at {LUME}")
def test_lume_validation_rows_are_read(tmp_path):
    copy_rows(LUME, "validation", tmp_path / "copy")
    assert [len(read_rows(tmp_path / "copy", name)) for name in ("forget", "retain")] == [254, 278]
    counts = [len((tmp_path / "copy" / "mia" / f"{name}.jsonl").read_text().splitlines()) for name in
              ("member", "nonmember")]  # fmt: skip
    assert counts == [34, 100]
