"""Whole commands on checkpoints of other families than the world's: positions, dropout, soft caps, odd configs."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import neko_lean
from neko_lean.cache.settings import CacheSettings
from neko_lean.models.loading import load_model
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.scoring.options import ScoreSettings
from tests.helpers import flat, make_rows, write_rows

TWO_STEPS = {"max_steps": 2, "forget_rows": 4, "retain_rows": 4, "dtype": "float32"}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4}


@pytest.fixture(scope="module")
def build(world, tmp_path_factory):
    """A folder with a random model of a family and the world's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}

    def make(family, model=None, config_json=None, **more):
        folder = tmp_path_factory.mktemp(family)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **ends, **more
        )
        torch.manual_seed(0)
        built = getattr(transformers, model or f"{family}ForCausalLM")(config)
        with torch.no_grad():
            built.get_output_embeddings().weight.mul_(20)
        built.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if config_json:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config_json))
        return folder

    return make


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
    "llama, other outputs": ("Llama", None, {"return_dict": False, "output_attentions": True}, LLAMA),
    "gemma2": (
        "Gemma2",
        None,
        None,
        LLAMA | {"head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 5.0},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_command_runs(build, world, tmp_path, name):
    family, model, config, sizes = MODELS[name]
    folder = build(family, model, config, **sizes)
    neko_lean.cache_teacher(
        folder, world, tmp_path / "cache", settings=CacheSettings(dtype="float32"), options=OutputOptions(quiet=True)
    )
    options = {"cache": tmp_path / "cache", "recipe": "neko", "overrides": {**TWO_STEPS, "format": "plain"}}
    options["overrides"] |= {"max_length": 512}
    flat(neko_lean.unlearn)(folder, tmp_path / "out", world, world, quiet=True, **options)
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["retain_loss"] < 1e-4  # a student is its own teacher
    scores = neko_lean.score(
        tmp_path / "out",
        world,
        tmp_path / "scores",
        settings=ScoreSettings(max_new_tokens=4),
        options=OutputOptions(quiet=True),
    )
    assert scores["rows"] == {"forget": 24, "retain": 36}


def test_rows_longer_than_the_learned_positions_are_cut_with_a_count(build, world, tmp_path, capsys):
    folder = build("GPT2", "GPT2LMHeadModel", n_positions=48, **GPT2)
    for stem, name in (("forget", "Foo"), ("retain", "Rix")):
        first, *others = make_rows(name)
        write_rows(tmp_path / f"{stem}.jsonl", [replace(first, output="word " * 100), *others])

    neko_lean.cache_teacher(
        folder, tmp_path, tmp_path / "cache", settings=CacheSettings(dtype="float32"), options=OutputOptions(quiet=True)
    )
    said = capsys.readouterr().err
    assert "warning: the model has 48 positions, fewer than the 512 asked for: 1 of 24 rows cut to 48 tokens" in said

    change = {**TWO_STEPS, "format": "plain", "max_length": 512}
    options = {"cache": tmp_path / "cache", "recipe": "neko", "overrides": change, "quiet": True}
    flat(neko_lean.unlearn)(folder, tmp_path / "out", tmp_path, tmp_path, **options)
    assert "the model has 48 positions" in capsys.readouterr().err

    neko_lean.memorize(
        folder, tmp_path, tmp_path / "learned", overrides={"max_steps": 1}, options=RunOptions(quiet=True)
    )
    assert "the model has 48 positions" in capsys.readouterr().err
    neko_lean.score(folder, world, tmp_path / "scores", options=OutputOptions(quiet=True))


@pytest.mark.parametrize("way", ["layerwise", "checkpointed", "plain"])
def test_a_student_is_its_own_teacher_whatever_the_configs_dropout(build, world, tmp_path, way):
    folder = build("GPT2", "GPT2LMHeadModel", n_positions=256, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, **GPT2)
    neko_lean.cache_teacher(
        folder,
        world,
        tmp_path / "cache",
        settings=CacheSettings(dtype="float32", top_k=4096, mass=1),
        options=OutputOptions(quiet=True),
    )
    change = {**TWO_STEPS, "max_steps": 1, "format": "plain", "max_length": 512, "backward": way}

    def first_kl(**more):
        out = tmp_path / f"out{len(more)}"
        neko_lean.unlearn(
            folder,
            out,
            world,
            world,
            cache=tmp_path / "cache",
            recipe="neko",
            overrides=change | more,
            options=RunOptions(quiet=True),
        )
        return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["retain_loss"]

    assert abs(first_kl()) < 1e-5
    if way != "layerwise":
        assert first_kl(dropout=True) > 1e-3


def test_a_soft_cap_is_there_while_a_model_is_made(build, world, tmp_path):
    """Loss and log-probabilities are those of the capped model, in both dtypes."""
    folder = build("Gemma2", **MODELS["gemma2"][3])
    made = neko_lean.memorize(
        folder, world, tmp_path / "made", overrides={"max_steps": 3, "lr": 3e-3}, options=RunOptions(quiet=True)
    )
    assert made["steps"] == 3
    for dtype in (torch.float32, torch.bfloat16):
        lm = load_model(tmp_path / "made", dtype, torch.device("cpu"))
        assert lm.softcap == 5.0
        ids = torch.arange(12)[None] + 3
        with torch.no_grad():
            wanted = lm.model(input_ids=ids).logits[0].float()
            got = lm.logits(lm.hidden(ids)[0])
        assert wanted.abs().max() <= 5.0
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 0.05)
