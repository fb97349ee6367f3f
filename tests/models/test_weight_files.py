"""Weight files: an index agrees with its files, and weights of other formats are never taken for none."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import neko_lean
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import model_folder
from neko_lean.models.weight_files import stored_tensors
from tests.helpers import flat
from tests.models.checkpoints import load


def save_in_two_files(folder, tensors, index_changes=None):
    """Replace the weights of a checkpoint by two files and their index; a file of None in `index_changes` removes a
    tensor from the index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part} | (index_changes or {})
    weight_map = {name: file for name, file in weight_map.items() if file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_that_disagrees_with_its_files_is_refused(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    folder = shutil.copytree(model, tmp_path / "good")
    save_in_two_files(folder, tensors)
    assert torch.equal(load(folder).head, tensors["lm_head.weight"])

    last = sorted(tensors)[-1]
    for changes, message in (
        ({"extra.weight": "a.safetensors"}, "lists extra.weight"),
        ({last: None}, f"holds {last}"),
    ):
        other = shutil.copytree(model, tmp_path / message.replace(" ", "-"))
        save_in_two_files(other, tensors, changes)
        with pytest.raises(NekoLeanError, match=message):
            load(other)


def test_a_tensor_in_two_files_must_be_the_same_in_both(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    folder = shutil.copytree(model, tmp_path / "good")
    save_in_two_files(folder, tensors)
    second = load_file(folder / "b.safetensors")
    save_file({**second, "lm_head.weight": tensors["lm_head.weight"]}, folder / "b.safetensors", {"format": "pt"})
    assert torch.equal(load(folder).head, tensors["lm_head.weight"])
    save_file({**second, "lm_head.weight": tensors["lm_head.weight"] + 1}, folder / "b.safetensors", {"format": "pt"})
    with pytest.raises(NekoLeanError, match=r"both hold lm_head.weight"):
        load(folder)


def test_other_formats_are_named(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "gguf")
    (folder / "model.safetensors").rename(folder / "model-q4_0.gguf")
    with pytest.raises(NekoLeanError, match="GGUF"):
        stored_tensors(folder)
    folder = shutil.copytree(model, tmp_path / "shards")
    shutil.copy(folder / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(NekoLeanError, match="distributed checkpoint"):
        load(folder)


def test_pickles_are_not_read(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(NekoLeanError, match="safetensors only"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model-q4_0.gguf",
        "tf_model.h5",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "model.pt",
        "original/consolidated.00.pth",
        "model.safetensors (broken link)",
    ],
)
def test_memorize_initialises_at_random_only_without_any_weights(world, tmp_path, name):
    folder = shutil.copytree(world / "base", tmp_path / "base")
    if "link" in name:
        (folder / name.split()[0]).symlink_to(tmp_path / "gone")
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    with pytest.raises(NekoLeanError):
        flat(neko_lean.memorize)(folder, tmp_path / "out", data=world, overrides={"max_steps": 1}, quiet=True)
    assert not (tmp_path / "out").exists()

    (folder / "config.json").unlink()
    if name.endswith("gguf"):
        with pytest.raises(NekoLeanError, match="GGUF"):
            model_folder(folder)
