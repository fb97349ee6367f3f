"""Fingerprints: equal for models that compute the same, different for every value that changes a log-probability."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import neko_lean
from neko_lean.cache.check import check_cache
from neko_lean.cache.manifest import read_manifest
from neko_lean.cache.writer import cache_teacher
from neko_lean.checkpoints.sealing import seal
from neko_lean.errors import NekoLeanError
from neko_lean.models.fingerprints import (
    config_differences,
    identify,
    model_config,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from neko_lean.models.loading import load_model, load_tokenizer
from tests.checkpoints.interrupted import Killed, kill_at
from tests.helpers import SMALL, flat, make_cache, resign
from tests.scoring.calls import score_with


def change(folder, **values):
    """Set values in config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def changed(model, tmp_path, name="changed", **values):
    return change(shutil.copytree(model, tmp_path / name), **values)


ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
# Values that change what the model computes, and the expected words of the refusal.
DECISIVE = {
    "clip_qkv": ({"clip_qkv": 0.5}, "clip_qkv (not set, now 0.5)"),
    "rope theta": (
        {"rope_parameters": ROPE | {"rope_theta": 500.0}},
        "rope_parameters.rope_theta (10000.0, now 500.0)",
    ),
    "rope theta, old spelling": ({"rope_parameters": None, "rope_theta": 500.0}, "rope_parameters.rope_theta"),
    "rope scaling": ({"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}, "rope_parameters.factor"),
    "activation": ({"hidden_act": "gelu"}, 'hidden_act ("silu", now "gelu")'),
    "key that the class does not know": ({"logit_soft": 3.0}, "logit_soft (not set, now 3.0)"),
}
# Values that change no log-probability.
HARMLESS = {
    "names": {"_name_or_path": "x/y", "architectures": ["Other"], "transformers_version": "4.0", "auto_map": {}},
    "dropout": {"attention_dropout": 0.3, "layerdrop": 0.1, "router_jitter_noise": 0.1},
    "parts that text does not reach": {"image_token_id": 7, "vision_config": {"hidden_size": 3}},
    "dtype": {"torch_dtype": "float16", "dtype": "float16"},
    "token ids": {"eos_token_id": 5, "pad_token_id": 6, "bos_token_id": 7},
    "outputs": {"use_cache": False, "output_attentions": True, "return_dict": False, "initializer_range": 1.0},
    "stated defaults": {"attention_bias": False, "clip_qkv": None, "num_key_value_heads": 4},
    "omitted defaults": {"hidden_act": None, "rope_parameters": None, "num_key_value_heads": None},
}


def test_fingerprints_depend_on_content_only(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert weights_fingerprint(copy) == weights_fingerprint(model)

    # The same tensors in two files are the same weights.
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    (copy / "model.safetensors").unlink()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_fingerprint(copy) == weights_fingerprint(model)

    tensors[names[0]].view(-1)[0] += 1
    save_file({name: tensors[name] for name in names[::2]}, copy / "a.safetensors")
    assert weights_fingerprint(copy) != weights_fingerprint(model)


def test_tokenizer_fingerprints_depend_on_content_only(model, tmp_path):
    tokenizer = load_tokenizer(model)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)  # calling it changes nothing
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "again")) == before
    tokenizer.add_tokens(["newtoken"])
    assert tokenizer_fingerprint(tokenizer) != before


@pytest.mark.slow
@pytest.mark.parametrize("name", DECISIVE)
def test_a_changed_config_with_the_same_weights_is_refused_everywhere(world, model, tmp_path, monkeypatch, name):
    values, message = DECISIVE[name]
    other = changed(model, tmp_path, **values)
    assert weights_fingerprint(other) == weights_fingerprint(model)
    cache, quiet = tmp_path / "cache", {"quiet": True}
    make_cache(model, world, cache, dtype="float32", format="neko", **quiet)

    def unlearn(folder, out, **kwargs):
        defaults = {"cache": cache, "recipe": "neko", "overrides": SMALL, **quiet}
        return flat(neko_lean.unlearn)(folder, tmp_path / out, forget=world, retain=world, **{**defaults, **kwargs})

    # Uses of the model's cache with the other model.
    commands = [
        lambda: unlearn(other, "out"),
        lambda: make_cache(other, world, cache, dtype="float32", format="neko", resume=True, **quiet),
        lambda: check_cache(cache, other, 1, retain=world),
    ]
    # A run of the model, resumed with the other one.
    graddiff = {"cache": None, "recipe": "graddiff"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        unlearn(model, "resumed", save_every=2, **graddiff)
    commands.append(lambda: unlearn(other, "resumed", resume=True, **graddiff))
    stage = tmp_path / ".scores.partial"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("neko_lean.scoring.results.example_numbers", lambda *_: (_ for _ in ()).throw(Killed))
        score_with(model, world, tmp_path / "scores", max_new_tokens=2, **quiet)
    assert stage.is_dir()
    # Scores of the model, resumed with the other one.
    commands.append(
        lambda: flat(neko_lean.score)(other, tmp_path / "scores", data=world, max_new_tokens=2, resume=True, **quiet)
    )

    for command in commands:
        with pytest.raises(NekoLeanError) as error:
            command()
        assert message in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists() and stage.is_dir()


@pytest.mark.parametrize("name", HARMLESS)
def test_values_that_change_no_log_probability_are_ignored(model, tmp_path, name):
    other = changed(model, tmp_path, **HARMLESS[name])
    assert config_differences(model_config(model), model_config(other)) == []
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert model_config(other) == model_config(model)


FAMILIES = {
    "norm": ("Llama", {"rms_norm_eps": 1e-2}, "rms_norm_eps (1e-06, now 0.01)"),
    "window": ("Mistral", {"sliding_window": 7}, "sliding_window (4096, now 7)"),
    "soft cap": ("Gemma2", {"final_logit_softcapping": 5.0}, "final_logit_softcapping (30.0, now 5.0)"),
    "scale": ("Granite", {"logits_scaling": 2.0}, "logits_scaling"),
    "layer types": ("Gemma3Text", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    "tied": ("Llama", {"tie_word_embeddings": True}, "tie_word_embeddings (not set, now true)"),
    "padding that positions depend on": ("XGLM", {"pad_token_id": 3}, "pad_token_id (1, now 3)"),
    "experts per token": ("Mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok (2, now 1)"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_decisive_values_of_other_families(tmp_path, name):
    family, values, message = FAMILIES[name]
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    getattr(transformers, f"{family}Config")(**sizes).save_pretrained(tmp_path / "original")
    copy = shutil.copytree(tmp_path / "original", tmp_path / "copy")
    original = model_config(tmp_path / "original")
    assert original == model_config(copy)
    (difference,) = config_differences(original, model_config(change(copy, **values)))
    assert message in difference


def test_long_lists_of_differences_are_truncated():
    old = {f"key{number}": number for number in range(8)}
    new = {key: value + 1 for key, value in old.items()}
    differences = config_differences(old, new)
    assert differences == [*(f"key{n} ({n}, now {n + 1})" for n in range(5)), "3 more"]
    assert config_differences({"a": {"b": {"c": 1}}}, {"a": {"b": {}}}) == [
        "a.b (not set, now {})",
        "a.b.c (1, now not set)",
    ]
    assert len(config_differences({"a": "x" * 999}, {})[0]) < 100
    assert len(config_differences({"a" * 5000: 1}, {})[0]) < 100
    assert config_differences({"a": float("nan")}, {"a": float("nan")}) == []


@pytest.mark.slow
def test_dropout_rates_matter_if_training_uses_dropout(world, model, tmp_path, monkeypatch):
    other = changed(model, tmp_path, attention_dropout=0.3)
    assert model_config(other) == model_config(model)
    assert "attention_dropout (0.0, now 0.3)" in config_differences(
        model_config(model, training=True), model_config(other, training=True)
    )
    kwargs = {"recipe": "graddiff", "overrides": {**SMALL, "dropout": True, "backward": "plain"}, "quiet": True}
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        flat(neko_lean.unlearn)(model, out, forget=world, retain=world, save_every=2, **kwargs)
    with pytest.raises(NekoLeanError, match="attention_dropout"):
        flat(neko_lean.unlearn)(other, out, forget=world, retain=world, resume=True, **kwargs)
    state = tmp_path / ".out.saved" / "step-00000002" / "state.json"
    written = json.loads(state.read_text())
    del written["identity"]["config"]
    state.write_text(json.dumps(written))
    for path in (tmp_path / ".out.saved").glob("step-*"):
        (path / "manifest.json").unlink()
        seal(path)
    with pytest.raises(NekoLeanError, match="not recorded by the version that started the run"):
        flat(neko_lean.unlearn)(model, out, forget=world, retain=world, resume=True, **kwargs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.slow
def test_a_checkpoint_saved_again_is_the_same_model(world, tmp_path, dtype):
    """memorize, a plain load and save, and unlearn all keep the config."""
    first = tmp_path / "first"
    flat(neko_lean.memorize)(world / "base", first, data=world, overrides={"max_steps": 1, "dtype": dtype}, quiet=True)
    assert config_differences(model_config(world / "base"), model_config(first)) == []
    lm, tokenizer = load_model(first, getattr(torch, dtype), torch.device("cpu")), load_tokenizer(first)
    lm.model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert identify(tmp_path / "again", load_tokenizer(tmp_path / "again")) == identify(first, tokenizer)
    flat(neko_lean.unlearn)(
        first, tmp_path / "out", forget=world, retain=world, recipe="neko", overrides=SMALL, quiet=True
    )
    assert model_config(tmp_path / "out") == model_config(first)


@pytest.mark.slow
def test_a_cache_of_format_1_is_read_with_a_warning(world, model, cache, tmp_path, capsys):
    old = shutil.copytree(cache, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest["format_version"] == 3 and manifest["config"] == model_config(model)
    del manifest["config"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    resign(old, format_version=1)
    assert read_manifest(old / "manifest.json").config is None
    flat(neko_lean.unlearn)(
        model, tmp_path / "out", forget=world, retain=world, cache=old, recipe="neko", overrides=SMALL, quiet=True
    )
    stderr = capsys.readouterr().err
    assert stderr.count("warning: ") == 1 and "run cache-teacher again to be sure" in stderr
    flat(cache_teacher)(model, old, retain=world, dtype="float32", format="neko", resume=True, quiet=True)
    assert "taken as complete by its weights alone" in capsys.readouterr().err


def test_a_manifest_of_format_2_needs_its_config(cache, tmp_path):
    for value in (None, [], "x"):
        other = shutil.copytree(cache, tmp_path / str(value))
        resign(other, config=value)
        with pytest.raises(NekoLeanError, match="config"):
            read_manifest(other / "manifest.json")


def test_a_reference_with_another_tokenizer_is_refused(world, model, cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "other")
    resign(other, tokenizer="0" * 64)
    with pytest.raises(NekoLeanError, match="another tokenizer"):
        flat(neko_lean.score)(
            model, tmp_path / "s", data=world, mia=world / "mia", reference=other, max_new_tokens=2, quiet=True
        )
    assert tokenizer_fingerprint(load_tokenizer(model)) != "0" * 64
