"""Loaded weights are exactly those of the files, whatever config.json says."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import neko_lean
from neko_lean.cache import cache_teacher
from neko_lean.errors import NekoLeanError
from neko_lean.models.load_checks import is_finite
from neko_lean.scoring.run import score
from tests.helpers import SMALL, flat, random_model
from tests.models.checkpoints import build, configure, load, prefixed, renamed, rewrite, without


@pytest.fixture(scope="session")
def tied(world, tmp_path_factory):
    return random_model(world, tmp_path_factory.mktemp("tied"), tied=True)


@pytest.mark.parametrize("change", [prefixed("_orig_mod."), without("layers.1."), without("lm_head")])
def test_every_command_refuses_wrong_weights_and_writes_nothing(model, world, tmp_path, change):
    (tmp_path / "out").mkdir()
    folder, out = rewrite(model, tmp_path / "changed", change), tmp_path / "out" / "x"
    for run in (
        lambda: flat(score)(folder, out, data=world, max_new_tokens=4, quiet=True),
        lambda: flat(cache_teacher)(folder, out, retain=world, quiet=True),
        lambda: flat(neko_lean.memorize)(folder, out, data=world, overrides=SMALL, quiet=True),
        lambda: flat(neko_lean.unlearn)(
            folder, out, forget=world, retain=world, recipe="neko", overrides=SMALL, quiet=True
        ),
    ):
        with pytest.raises(NekoLeanError, match=r"are not those of the OlmoForCausalLM that its config.json describes"):
            run()
        assert not list((tmp_path / "out").iterdir())


def test_names_without_the_base_prefix_and_old_buffers_are_accepted(model, tied, tmp_path):
    # transformers saves base models without the prefix; old checkpoints hold rotary frequencies.
    bare = rewrite(model, tmp_path / "bare", lambda t: {n.removeprefix("model."): x for n, x in t.items()})
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    with_buffers = rewrite(model, tmp_path / "buffers", lambda t: {**t, **buffers})
    for folder in (bare, with_buffers):
        assert torch.equal(load(folder).head, load(model).head)

    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    lm = load(tied)
    assert lm.head is lm.embedding
    # Some programs store the head of a tied model instead of its embedding.
    swapped = load(rewrite(tied, tmp_path / "swapped", renamed("model.embed_tokens", "lm_head")))
    assert torch.equal(swapped.embedding, lm.embedding) and swapped.head is swapped.embedding


def test_masks_in_old_gpt2_checkpoints_are_ignored(tmp_path):
    model = build("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    masks = {f"h.{n}.attn.bias": mask.clone() for n in range(2)} | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    old = rewrite(
        tmp_path / "gpt2", tmp_path / "old", lambda t: {n.removeprefix("transformer."): x for n, x in t.items()} | masks
    )
    assert torch.equal(load(old).head, model.lm_head.weight)


def test_a_stored_head_that_differs_from_the_tied_embedding_is_kept(tied, tmp_path, capsys):
    head = torch.randn_like(load(tied).embedding)
    folder = rewrite(tied, tmp_path / "both", lambda t: {**t, "lm_head.weight": head})
    lm = load(folder)
    assert torch.equal(lm.head, head) and not torch.equal(lm.embedding, head)
    assert "tie_word_embeddings: false" in capsys.readouterr().err

    # What is saved says that they are not tied.
    lm.model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load(tmp_path / "saved").head, head)

    # Equal tensors stay tied, and an untied config needs no warning.
    same = rewrite(tied, tmp_path / "same", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    lm = load(same)
    assert lm.head is lm.embedding and lm.model.config.tie_word_embeddings
    assert "warning" not in capsys.readouterr().err
    configure(folder, tie_word_embeddings=False)
    assert torch.equal(load(folder).head, head) and "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_weights_are_named(model, tmp_path, value, stored, dtype):
    def change(tensors):
        tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
        tensors["model.layers.1.mlp.down_proj.weight"].view(-1)[-1] = value
        return tensors

    with pytest.raises(NekoLeanError, match=r"model.layers.1.mlp.down_proj.weight in .* holds NaN or infinite"):
        load(rewrite(model, tmp_path / "broken", change), dtype)


def test_weights_that_overflow_in_the_dtype_are_named(model, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"][0, 0] = torch.finfo(torch.float32).max
        return tensors

    folder = rewrite(model, tmp_path / "large", change)
    with pytest.raises(NekoLeanError, match=r"lm_head.weight in .* as bfloat16"):
        load(folder, torch.bfloat16)


def test_is_finite():
    assert is_finite(torch.zeros(0)) and is_finite(torch.tensor(1.0)) and is_finite(torch.randn(3, 5).T)
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not is_finite(torch.tensor([1.0, value])) and not is_finite(torch.tensor(value))


def test_tensors_that_transformers_drops_are_named(world, tmp_path, capsys, monkeypatch):
    folder = random_model(world, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.visual.weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(transformers.OlmoForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.visual"])
    load(folder)
    warning = "warning: checkpoints written from this model will lack 1 tensors of the original, because they are not "
    assert f"{warning}part of OlmoForCausalLM: model.visual.weight." in capsys.readouterr().err
