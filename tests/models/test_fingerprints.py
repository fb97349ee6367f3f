"""What makes two models the same: not their names, but every value of config.json that changes a log-probability."""

import json
import shutil

import pytest
import torch
import transformers

import neko_lean
from neko_lean.cache.check import check_cache
from neko_lean.cache.manifest import read_manifest
from neko_lean.cache.settings import CacheSettings
from neko_lean.cache.writer import cache_teacher
from neko_lean.checkpoints.saves import seal
from neko_lean.errors import NekoLeanError
from neko_lean.models.fingerprints import (
    config_differences,
    identify,
    model_config,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.scoring.options import ScoreInputs, ScoreSettings
from tests.checkpoints.test_resume import Killed, kill_at
from tests.helpers import SMALL, flat, resign


def change(folder, **values):
    """Lay values over config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def changed(model, tmp_path, name="changed", **values):
    return change(shutil.copytree(model, tmp_path / name), **values)


ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
DECISIVE = {
    "clip_qkv": ({"clip_qkv": 0.5}, "clip_qkv (not set, now 0.5)"),
    "rope theta": (
        {"rope_parameters": ROPE | {"rope_theta": 500.0}},
        "rope_parameters.rope_theta (10000.0, now 500.0)",
    ),
    "rope theta, old spelling": ({"rope_parameters": None, "rope_theta": 500.0}, "rope_parameters.rope_theta"),
    "rope scaling": ({"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}, "rope_parameters.factor"),
    "activation": ({"hidden_act": "gelu"}, 'hidden_act ("silu", now "gelu")'),
    "key the class does not know": ({"logit_soft": 3.0}, "logit_soft (not set, now 3.0)"),
}
HARMLESS = {
    "names": {"_name_or_path": "x/y", "architectures": ["Other"], "transformers_version": "4.0", "auto_map": {}},
    "dropout": {"attention_dropout": 0.3, "layerdrop": 0.1, "router_jitter_noise": 0.1},
    "parts that no text reaches": {"image_token_id": 7, "vision_config": {"hidden_size": 3}},
    "dtype": {"torch_dtype": "float16", "dtype": "float16"},
    "token ids": {"eos_token_id": 5, "pad_token_id": 6, "bos_token_id": 7},
    "outputs": {"use_cache": False, "output_attentions": True, "return_dict": False, "initializer_range": 1.0},
    "a stated default": {"attention_bias": False, "clip_qkv": None, "num_key_value_heads": 4},
    "a default left out": {"hidden_act": None, "rope_parameters": None, "num_key_value_heads": None},
}


@pytest.mark.parametrize("name", DECISIVE)
def test_every_place_refuses_another_function_of_the_same_weights(world, model, tmp_path, monkeypatch, name):
    values, words = DECISIVE[name]
    other = changed(model, tmp_path, **values)
    assert weights_fingerprint(other) == weights_fingerprint(model)
    cache, quiet = tmp_path / "cache", {"quiet": True}
    flat(cache_teacher)(model, world, cache, dtype="float32", format="neko", **quiet)

    def unlearn(folder, out, **options):
        given = {"cache": cache, "recipe": "neko", "overrides": SMALL, **quiet}
        return flat(neko_lean.unlearn)(folder, tmp_path / out, world, world, **{**given, **options})

    refusals = [
        lambda: unlearn(other, "out"),
        lambda: flat(cache_teacher)(other, world, cache, dtype="float32", format="neko", resume=True, **quiet),
        lambda: check_cache(cache, other, world, 1),
    ]
    # A run of the one, resumed with the other.
    graddiff = {"cache": None, "recipe": "graddiff"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        unlearn(model, "resumed", save_every=2, **graddiff)
    refusals.append(lambda: unlearn(other, "resumed", resume=True, **graddiff))
    stage = tmp_path / ".scores.partial"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("neko_lean.scoring.run.row_numbers", lambda *_: (_ for _ in ()).throw(Killed))
        flat(neko_lean.score)(model, world, tmp_path / "scores", max_new_tokens=2, **quiet)
    assert stage.is_dir()
    refusals.append(
        lambda: flat(neko_lean.score)(other, world, tmp_path / "scores", max_new_tokens=2, resume=True, **quiet)
    )
    for refusal in refusals:
        with pytest.raises(NekoLeanError) as caught:
            refusal()
        assert words in str(caught.value), str(caught.value)
    assert not (tmp_path / "out").exists() and stage.is_dir()


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_log_probability_is_no_difference(model, tmp_path, name):
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
    "padding that positions count from": ("XGLM", {"pad_token_id": 3}, "pad_token_id (1, now 3)"),
    "experts a token": ("Mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok (2, now 1)"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_values_of_other_families(tmp_path, name):
    family, values, words = FAMILIES[name]
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    getattr(transformers, f"{family}Config")(**sizes).save_pretrained(tmp_path / "one")
    two = shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert model_config(tmp_path / "one") == model_config(two)
    (found, *more) = config_differences(model_config(tmp_path / "one"), model_config(change(two, **values)))
    assert words in found and more == []


def test_a_long_list_is_cut_and_says_so():
    old = {f"key{number}": number for number in range(8)}
    new = {key: value + 1 for key, value in old.items()}
    found = config_differences(old, new)
    assert found == [*(f"key{n} ({n}, now {n + 1})" for n in range(5)), "3 more"]
    assert config_differences({"a": {"b": {"c": 1}}}, {"a": {"b": {}}}) == [
        "a.b (not set, now {})",
        "a.b.c (1, now not set)",
    ]
    assert len(config_differences({"a": "x" * 999}, {})[0]) < 100
    assert len(config_differences({"a" * 5000: 1}, {})[0]) < 100
    assert config_differences({"a": float("nan")}, {"a": float("nan")}) == []


def test_rates_of_dropout_count_where_training_draws_from_it(world, model, tmp_path, monkeypatch):
    other = changed(model, tmp_path, attention_dropout=0.3)
    assert model_config(other) == model_config(model)
    assert "attention_dropout (0.0, now 0.3)" in config_differences(
        model_config(model, training=True), model_config(other, training=True)
    )
    given = {"recipe": "graddiff", "overrides": {**SMALL, "dropout": True, "backward": "plain"}, "quiet": True}
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        flat(neko_lean.unlearn)(model, out, world, world, save_every=2, **given)
    with pytest.raises(NekoLeanError, match="attention_dropout"):
        flat(neko_lean.unlearn)(other, out, world, world, resume=True, **given)
    state = tmp_path / ".out.saved" / "step-00000002" / "state.json"
    written = json.loads(state.read_text())
    del written["identity"]["config"]
    state.write_text(json.dumps(written))
    for path in (tmp_path / ".out.saved").glob("step-*"):
        (path / "manifest.json").unlink()
        seal(path)
    with pytest.raises(NekoLeanError, match="did not write it down"):
        flat(neko_lean.unlearn)(model, out, world, world, resume=True, **given)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_checkpoint_saved_again_is_the_same_model(world, tmp_path, dtype):
    """What memorize writes, what a plain load and save makes of it, and what unlearn makes of that."""
    first = tmp_path / "first"
    neko_lean.memorize(
        world / "base", world, first, overrides={"max_steps": 1, "dtype": dtype}, options=RunOptions(quiet=True)
    )
    assert config_differences(model_config(world / "base"), model_config(first)) == []
    lm, tokenizer = load_model(first, getattr(torch, dtype), torch.device("cpu")), load_tokenizer(first)
    lm.model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert identify(tmp_path / "again", load_tokenizer(tmp_path / "again")) == identify(first, tokenizer)
    neko_lean.unlearn(
        first, tmp_path / "out", world, world, recipe="neko", overrides=SMALL, options=RunOptions(quiet=True)
    )
    assert model_config(tmp_path / "out") == model_config(first)


def test_a_cache_of_format_1_is_read_and_warned_about(world, model, cache, tmp_path, capsys):
    old = shutil.copytree(cache, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest["format_version"] == 2 and manifest["config"] == model_config(model)
    del manifest["config"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    resign(old, format_version=1)
    assert read_manifest(old / "manifest.json").config is None
    neko_lean.unlearn(
        model, tmp_path / "out", world, world, cache=old, recipe="neko", overrides=SMALL, options=RunOptions(quiet=True)
    )
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "run cache-teacher again to be sure" in said
    cache_teacher(
        model,
        world,
        old,
        settings=CacheSettings(dtype="float32", format="neko"),
        options=OutputOptions(resume=True, quiet=True),
    )
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
        neko_lean.score(
            model,
            world,
            tmp_path / "s",
            inputs=ScoreInputs(mia=world / "mia", reference=other),
            settings=ScoreSettings(max_new_tokens=2),
            options=OutputOptions(quiet=True),
        )
    assert tokenizer_fingerprint(load_tokenizer(model)) != "0" * 64
