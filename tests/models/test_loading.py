"""Loading config, tokenizer and weights, and the errors for folders that hold no usable model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.models.fingerprints import weights_fingerprint
from neko_lean.models.loading import load_model, load_tokenizer, model_folder, new_model
from tests.models.checkpoints import build, configure, duplicated, load, rewrite, without

CPU = torch.device("cpu")
# Families that differ in names, in what is tied, in fused experts, and in buffers.
FAMILIES = [
    "bloom", "cohere", "deepseek_v3", "ernie4_5_moe", "falcon", "gemma", "gemma3_text", "glm4", "gpt_neox", "gpt_oss",
    "gpt2", "gptj", "granitemoe", "llama", "mamba", "mixtral", "opt", "phi3", "qwen2_moe", "qwen3", "qwen3_moe",
    "stablelm",
]  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_checkpoints_that_transformers_saves_load_unchanged(model_type, tmp_path, monkeypatch):
    # Whether they are supported for training is not tested here.
    monkeypatch.setattr("neko_lean.models.loading.as_causal_lm", lambda model: model)
    model = build(model_type)
    model.save_pretrained(tmp_path)
    loaded, expected = load(tmp_path).state_dict(), model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)

    loaded = load(tmp_path, torch.bfloat16)
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", torch.bfloat16).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.state_dict().items())


def test_checkpoints_that_this_package_saves_load(model, tmp_path):
    lm = as_causal_lm(load(model).model)
    lm.model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").head, lm.head)


def test_new_model_depends_on_the_seed_only(world):
    first, same, other = (new_model(world / "base", torch.float32, CPU, seed).head for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_folders_without_a_model_are_refused(world, model, tmp_path):
    for name in (tmp_path, tmp_path / "nowhere", "a/b/c", "plainname", "./x/y"):
        with pytest.raises(NekoLeanError):
            model_folder(name)
    with pytest.raises(NekoLeanError, match="safetensors"):
        load_model(world / "base", torch.float32, CPU)

    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(NekoLeanError, match="broken"):
        load_model(broken, torch.float32, CPU)
    with pytest.raises(NekoLeanError, match="not a readable safetensors"):
        weights_fingerprint(broken)

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    with pytest.raises(NekoLeanError, match="tokenizer"):
        load_tokenizer(broken)


def test_an_attention_kernel_that_is_not_installed_is_named(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "attn_implementation": "flash_attention_2"}))
    with pytest.raises(NekoLeanError, match=r"cannot be loaded as a causal language model \(FlashAttention2"):
        load_model(copy, torch.float32, CPU)


def test_a_config_that_describes_no_model_is_refused_in_one_line(model, tmp_path):
    for number, change in enumerate(
        ({"hidden_size": "64"}, {"num_attention_heads": 7}, {"vocab_size": None}, {"hidden_act": "nope"})
    ):
        folder = shutil.copytree(model, tmp_path / str(number))
        configure(folder, **change)
        with pytest.raises(NekoLeanError) as error:
            load(folder)
        assert "\n" not in str(error.value)


def test_a_padding_token_outside_the_vocabulary_is_replaced(model, tmp_path):
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    folder = shutil.copytree(model, tmp_path / "padded")
    tokenizer.save_pretrained(folder)
    reloaded = load_tokenizer(folder)
    assert tokenizer.pad_token_id >= len(load(model).head) > reloaded.pad_token_id == reloaded.eos_token_id
    assert reloaded("<padding>")["input_ids"] == tokenizer("<padding>")["input_ids"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", "{", '{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_refused(model, tmp_path, name, text):
    folder = shutil.copytree(model, tmp_path / "broken")
    (folder / name).write_text(text)
    if (name, text) == ("tokenizer_config.json", "{}") or (name == "tokenizer_config.json" and text.startswith('{"')):
        return  # a valid tokenizer_config.json
    with pytest.raises(NekoLeanError, match="holds no tokenizer"):
        load_tokenizer(folder)


def test_missing_and_surplus_experts_are_refused_in_one_line(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "good")
    names = list(load_file(tmp_path / "good" / "model.safetensors"))
    assert any(".experts.3." in name for name in names), names
    changes = {
        "one missing": without("layers.0.block_sparse_moe.experts.1.w1"),
        "expert missing": without("layers.0.block_sparse_moe.experts.3."),
        "surplus": duplicated("experts.3.", "experts.4."),
    }
    for name, change in changes.items():
        with pytest.raises(NekoLeanError, match=r"config.json") as error:
            load(rewrite(tmp_path / "good", tmp_path / name, change))
        assert "\n" not in str(error.value)


def test_an_adapter_is_refused_alone_and_next_to_a_model(model, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(NekoLeanError, match=r"adapter holds a PEFT adapter without its model, .* merge_and_unload"):
        model_folder(tmp_path / "adapter")
    shutil.copytree(model, tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    with pytest.raises(NekoLeanError, match=r"both a model and a PEFT adapter, .* move adapter_config.json out"):
        model_folder(tmp_path / "both")
