"""The tokens that end a generation, for any generation_config.json; every checkpoint written keeps the file."""

import json
import shutil

import pytest
import torch

from neko_lean.errors import NekoLeanError
from neko_lean.models.generation_config import eos_token_ids, stated_eos_token_id, unknown_eos_token_ids
from neko_lean.models.loading import load_model, load_tokenizer, new_model
from neko_lean.models.sharding import save_checkpoint
from neko_lean.scoring.generation import generation_warnings
from tests.helpers import random_model

FILE = "generation_config.json"


@pytest.fixture
def folder(world, tmp_path):
    return random_model(world, tmp_path / "m")


def loaded(folder):
    return load_model(folder, torch.float32, torch.device("cpu")), load_tokenizer(folder)


@pytest.mark.parametrize(
    ("stated", "expected", "unknown"),
    [(5, {5}, []), ([5, 7], {5, 7}, []), (None, set(), []), ([], set(), []), ([[5], [7, 7.0]], {5, 7}, []),
     ([5, -1, 10**9, "7", True, None], {5}, [-1, 10**9, "7", True]), ("five", set(), ["five"]),
     ({"a": 5}, set(), [{"a": 5}]), (7.5, set(), [7.5])],
)  # fmt: skip
def test_every_stated_token_ends_a_generation(folder, stated, expected, unknown):
    (folder / FILE).write_text(json.dumps({"eos_token_id": stated}))
    lm, tokenizer = loaded(folder)
    assert eos_token_ids(lm, tokenizer) == expected | {tokenizer.eos_token_id}
    assert unknown_eos_token_ids(lm) == unknown and stated_eos_token_id(folder) == stated
    warnings = generation_warnings(lm, [[1, 2]], 4)
    assert len(warnings) == bool(unknown) and all(repr(entry) in warnings[0] for entry in unknown)


def test_without_the_file_the_end_tokens_come_from_config_json(folder):
    (folder / FILE).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 9]}))
    lm, tokenizer = loaded(folder)
    assert eos_token_ids(lm, tokenizer) == {3, 9, tokenizer.eos_token_id} and stated_eos_token_id(folder) is None


@pytest.mark.parametrize("text", ["{bad", "[1]", "3", "\ud800", "[" * 100000])
def test_a_file_that_is_not_a_json_object_is_refused(folder, text):
    (folder / FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(NekoLeanError, match=FILE):
        stated_eos_token_id(folder)


@pytest.mark.parametrize(
    "config",
    [{"eos_token_id": [2, 5]}, {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]},
     {"eos_token_id": "five"}, {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0, "eos_token_id": 5}],
)  # fmt: skip
@pytest.mark.parametrize("changed", [False, True])
def test_written_checkpoints_keep_the_file(folder, tmp_path, config, changed):
    (folder / FILE).write_text(json.dumps(config))
    lm, tokenizer = loaded(folder)
    if changed:  # save_pretrained refuses a combination that does not come from a file
        lm.model.generation_config.top_k = 7
        config = {**config, "top_k": 7}
    before = lm.model.generation_config
    save_checkpoint(lm, tokenizer, tmp_path / "out")
    written = json.loads((tmp_path / "out" / FILE).read_text())
    written.pop("transformers_version")
    assert written.pop("do_sample", False) is False and written == {k: v for k, v in config.items() if k != "do_sample"}
    assert lm.model.generation_config is before
    assert eos_token_ids(*loaded(tmp_path / "out")) == eos_token_ids(lm, tokenizer)


def test_a_generation_config_that_is_not_json_is_refused_at_load(world, tmp_path):
    folder = random_model(world, tmp_path / "model")
    (folder / "generation_config.json").write_text("[1, 2")
    with pytest.raises(NekoLeanError, match="is not readable JSON"):
        load_model(folder, torch.float32, torch.device("cpu"))


def test_a_new_model_gets_the_end_tokens_of_its_folder(world, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(world / "base", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    lm = new_model(folder, torch.float32, torch.device("cpu"), 0)
    assert eos_token_ids(lm, load_tokenizer(folder)) >= {1, 7}
