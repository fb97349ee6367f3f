"""Data sets on the hub: how they are named, which split is read, and what a missing package says."""

import sys
import types

import pytest

from neko_lean.data.examples import read_rows
from neko_lean.data.hub import HubName, parse_hub_name
from neko_lean.errors import NekoLeanError

ROWS = [{"question": "Who?", "answer": "Foo."}]


class Dataset(list):
    column_names = ("question", "answer")


@pytest.fixture
def hub(monkeypatch):
    """A package datasets that records how it was called. Tests set `splits`, or `error`."""
    module = types.ModuleType("datasets")
    module.calls, module.splits, module.error = [], {"train": Dataset(ROWS)}, None

    def load_dataset(name, config=None, *, split=None):
        module.calls.append((name, config, split))
        if module.error:
            raise module.error
        return module.splits[split] if split else module.splits

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_names_of_data_sets_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert parse_hub_name("owner/name") == HubName("owner/name", None, None)
    assert parse_hub_name("owner/name:config/train[:10%]") == HubName("owner/name", "config", "train[:10%]")
    for path in ("data/forget", "owner/forget.json", "forget", "/owner/name", "../owner/name", tmp_path / "x"):
        assert parse_hub_name(path) is None


def test_the_split_is_stated_or_unique_or_named_like_the_set(hub):
    assert read_rows("owner/name:config/train")[0].output == "Foo."
    assert len(read_rows("owner/name", "forget")) == 1
    hub.splits = {"forget": Dataset(ROWS), "retain": Dataset(ROWS * 2)}
    assert len(read_rows("owner/name", "retain")) == 2
    assert hub.calls == [("owner/name", "config", "train"), ("owner/name", None, None), ("owner/name", None, None)]
    with pytest.raises(NekoLeanError, match="has the splits forget, retain; append one"):
        read_rows("owner/name", "held")


def test_errors_are_one_sentence(hub, monkeypatch):
    hub.splits = {"train": Dataset([{"question": "Who?", "answer": " "}])}
    with pytest.raises(NekoLeanError, match="owner/name, row 1: column 'answer' is empty"):
        read_rows("owner/name")
    hub.error = ConnectionError("Offline mode is enabled.\nmore")
    with pytest.raises(NekoLeanError, match=r"cannot be loaded .*\(Offline mode is enabled\); expected owner/name"):
        read_rows("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NekoLeanError, match=r"pip install 'neko-lean\[hub\]'"):
        read_rows("owner/name")
