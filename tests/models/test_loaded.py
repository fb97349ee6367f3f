"""Loaded models in place of checkpoints."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from neko_lean.errors import NekoLeanError
from neko_lean.models.loaded import accepts_loaded_model, checkpoint_of
from tests.helpers import model_weights


@pytest.fixture
def loaded(model):
    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


def test_a_loaded_model_is_a_checkpoint_while_the_block_runs(model, loaded, tmp_path):
    with checkpoint_of(*loaded, tmp_path / "new" / "out") as checkpoint:
        assert checkpoint.name == model.name and tmp_path in checkpoint.parents
        saved, original = model_weights(checkpoint), model_weights(model)
        assert saved.keys() == original.keys() and all((saved[name] == original[name]).all() for name in saved)
        assert (checkpoint / "tokenizer.json").is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_path_stays_a_path(tmp_path):
    for name in ("owner/name", Path("folder")):
        with checkpoint_of(name, None, tmp_path / "out") as checkpoint:
            assert checkpoint == name


def test_the_folder_is_removed_after_an_error(loaded, tmp_path):
    @accepts_loaded_model
    def fail(model, out, *, tokenizer=None):
        assert Path(model, "config.json").is_file()
        raise NekoLeanError("no")

    with pytest.raises(NekoLeanError, match="no"):
        fail(loaded[0], tmp_path / "out", tokenizer=loaded[1])
    assert list(tmp_path.iterdir()) == []


def test_refused(model, loaded, tmp_path):
    class Adapter:
        merge_and_unload = None

    cases = [
        ((model, loaded[1]), "tokenizer has no effect"),
        ((loaded[0], None), "a loaded model needs its tokenizer"),
        ((Adapter(), loaded[1]), "type Adapter; .*merge the adapter first"),
        ((loaded[0].model.layers, loaded[1]), "type ModuleList; expected a checkpoint folder"),
    ]
    for arguments, message in cases:
        with pytest.raises(NekoLeanError, match=message), checkpoint_of(*arguments, tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_saved(loaded, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("invalid\ngeneration config")

    monkeypatch.setattr(loaded[0], "save_pretrained", fail)
    with (
        pytest.raises(NekoLeanError, match=r"cannot be saved as a checkpoint \(invalid\); save it"),
        checkpoint_of(*loaded, tmp_path / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_model_loaded_from_the_folder_above_is_saved_in_the_temporary_folder(loaded, tmp_path, monkeypatch):
    (tmp_path / "letters" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "letters" / "runs")
    for name, saved_as in (("..", "letters"), (".", "runs"), ("/", "OlmoForCausalLM"), ("", "OlmoForCausalLM")):
        loaded[0].config.name_or_path = name
        with checkpoint_of(*loaded, "out") as checkpoint:
            assert checkpoint.name == saved_as and list(Path().iterdir()) == [Path(checkpoint.parent.name)]
    assert list(Path().iterdir()) == []
