"""Whole commands on models of other families: positions, dropout, soft caps, unusual configs."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import neko_lean
from neko_lean.models.loading import load_model
from tests.helpers import flat, make_rows, write_rows

TWO_STEPS = {"max_steps": 2, "forget_rows": 4, "retain_rows": 4, "dtype": "float32"}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4}


@pytest.fixture(scope="module")
def build(world, tmp_path_factory):
    """Function that saves a random model of a family with the world's tokenizer and returns its folder."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    special_ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}

    def save(family, model_class=None, config_json=None, **sizes):
        folder = tmp_path_factory.mktemp(family)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **special_ids, **sizes
        )
        torch.manual_seed(0)
        model = getattr(transformers, model_class or f"{family}ForCausalLM")(config)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if config_json:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config_json))
        return folder

    return save


LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama4": (
        "Llama4Text",
        "Llama4ForCausalLM",
        None,
        LLAMA
        | {"head_dim": 16, "num_key_value_heads": 2, "intermediate_size_mlp": 64, "num_local_experts": 2}
        | {"num_experts_per_tok": 1},
    ),
    "openai-gpt": ("OpenAIGPT", "OpenAIGPTLMHeadModel", None, {"n_positions": 256} | GPT2),
    "mamba2": (
        "Mamba2",
        None,
        None,
        {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1}
        | {"chunk_size": 8},
    ),
    "llama with output switches": ("Llama", None, {"return_dict": False, "output_attentions": True}, LLAMA),
    "gemma2": (
        "Gemma2",
        None,
        None,
        LLAMA | {"head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 5.0},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_command_runs(build, world, tmp_path, name):
    family, model_class, config_json, sizes = MODELS[name]
    folder = build(family, model_class, config_json, **sizes)
    flat(neko_lean.cache_teacher)(folder, tmp_path / "cache", retain=world, dtype="float32", quiet=True)
    overrides = {**TWO_STEPS, "format": "plain", "max_length": 512}
    kwargs = {"cache": tmp_path / "cache", "recipe": "neko", "overrides": overrides}
    flat(neko_lean.unlearn)(folder, tmp_path / "out", forget=world, retain=world, quiet=True, **kwargs)
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["retain_loss"] < 1e-4  # student and teacher are equal at first
    scores = flat(neko_lean.score)(tmp_path / "out", tmp_path / "scores", data=world, max_new_tokens=4, quiet=True)
    assert scores["rows"] == {"forget": 24, "retain": 36}


@pytest.mark.slow
def test_examples_longer_than_the_learned_positions_are_truncated_with_a_warning(build, world, tmp_path, capsys):
    folder = build("GPT2", "GPT2LMHeadModel", n_positions=48, **GPT2)
    for stem, name in (("forget", "Foo"), ("retain", "Rix")):
        first, *rest = make_rows(name)
        write_rows(tmp_path / f"{stem}.jsonl", [replace(first, output="word " * 100), *rest])

    flat(neko_lean.cache_teacher)(folder, tmp_path / "cache", retain=tmp_path, dtype="float32", quiet=True)
    warning = "warning: 1 of 24 rows truncated to 48 tokens (157 tokens lost): the model has only 48 positions"
    assert warning in capsys.readouterr().err

    overrides = {**TWO_STEPS, "format": "plain", "max_length": 512}
    options = {"cache": tmp_path / "cache", "recipe": "neko", "overrides": overrides, "quiet": True}
    flat(neko_lean.unlearn)(folder, tmp_path / "out", forget=tmp_path, retain=tmp_path, **options)
    assert "the model has only 48 positions" in capsys.readouterr().err

    flat(neko_lean.memorize)(folder, tmp_path / "learned", data=tmp_path, overrides={"max_steps": 1}, quiet=True)
    assert "the model has only 48 positions" in capsys.readouterr().err
    flat(neko_lean.score)(folder, tmp_path / "scores", data=world, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("backward", ["layerwise", "checkpointed", "plain"])
def test_the_first_kl_is_zero_whatever_the_configs_dropout(build, world, tmp_path, backward):
    folder = build("GPT2", "GPT2LMHeadModel", n_positions=256, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, **GPT2)
    flat(neko_lean.cache_teacher)(
        folder, tmp_path / "cache", retain=world, dtype="float32", top_k=4096, mass=1, quiet=True
    )
    overrides = {**TWO_STEPS, "max_steps": 1, "format": "plain", "max_length": 512, "backward": backward}

    def first_kl(**changes):
        out = tmp_path / f"out{len(changes)}"
        kwargs = {"cache": tmp_path / "cache", "recipe": "neko", "overrides": overrides | changes}
        flat(neko_lean.unlearn)(folder, out, forget=world, retain=world, quiet=True, **kwargs)
        return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["retain_loss"]

    assert abs(first_kl()) < 1e-5
    if backward != "layerwise":
        assert first_kl(dropout=True) > 1e-3


@pytest.mark.slow
def test_memorize_trains_with_the_soft_cap(build, world, tmp_path):
    """The logits are those of the capped model, in both dtypes."""
    folder = build("Gemma2", **MODELS["gemma2"][3])
    result = flat(neko_lean.memorize)(
        folder, tmp_path / "made", data=world, overrides={"max_steps": 3, "lr": 3e-3}, quiet=True
    )
    assert result["steps"] == 3
    for dtype in (torch.float32, torch.bfloat16):
        lm = load_model(tmp_path / "made", dtype, torch.device("cpu"))
        assert lm.softcap == 5.0
        input_ids = torch.arange(12)[None] + 3
        with torch.no_grad():
            expected = lm.model(input_ids=input_ids).logits[0].float()
            actual = lm.logits(lm.hidden(input_ids)[0])
        assert expected.abs().max() <= 5.0
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 0.05)
