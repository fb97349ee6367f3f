"""Which backward pass is chosen for a model, and that it gives the gradients of a plain one."""

import dataclasses

import pytest
import torch
import transformers
from torch import nn

from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import as_causal_lm, checkpoint_activations
from neko_lean.recipe import load_recipe
from neko_lean.training import backward
from neko_lean.training.backward import plain_gradients, select_backward, verify_layer_pass
from neko_lean.training.layers import decoder_layers
from tests.helpers import SIZES

CPU = torch.device("cpu")
DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 2, **DROPOUT}


def llama(**more):
    torch.manual_seed(0)
    return as_causal_lm(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more)))


def gpt2():
    torch.manual_seed(0)
    return as_causal_lm(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)))


def opt():
    sizes = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.5}
    torch.manual_seed(0)
    return as_causal_lm(transformers.OPTForCausalLM(transformers.OPTConfig(**sizes)))


def test_the_recipes_choice_is_used_if_it_is_exact(capsys):
    recipe, layer_pass = select_backward(llama(), load_recipe("neko"), CPU)
    assert recipe.backward == "layerwise" and layer_pass is not None
    for backward_kind in ("checkpointed", "plain"):
        recipe, layer_pass = select_backward(llama(), load_recipe("neko", {"backward": backward_kind}), CPU)
        assert recipe.backward == backward_kind and layer_pass is None
    assert "warning" not in capsys.readouterr().err


def test_families_without_a_list_of_layers_are_checkpointed(capsys):
    recipe, layer_pass = select_backward(gpt2(), load_recipe("neko"), CPU)
    assert recipe.backward == "checkpointed" and layer_pass is None
    assert (
        "falling back to backward=checkpointed" in (err := capsys.readouterr().err)
        and "no list of decoder layers." in err
    )


class Scaled(nn.Module):
    """A layer with hidden state: its output depends on how often it has run."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, hidden, *args, **kwargs):
        self.calls += 1
        return self.layer(hidden, *args, **kwargs) * self.calls


class Failing(nn.Module):
    """A layer that fails when it is called with gradient a second time."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, hidden, *args, **kwargs):
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls > 2:
                raise KeyError("a cache that is gone")
        return self.layer(hidden, *args, **kwargs)


@pytest.mark.parametrize("odd", [Scaled, Failing])
def test_layers_that_cannot_be_run_again_are_not_run_layerwise(odd, capsys):
    lm = llama()
    lm.backbone.layers[1] = odd(lm.backbone.layers[1])
    recipe, layer_pass = select_backward(lm, load_recipe("neko"), CPU)
    assert layer_pass is None and recipe.backward in ("checkpointed", "plain")
    assert "falling back" in capsys.readouterr().err
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_layers_that_share_parameters_are_refused():
    lm = llama()
    lm.backbone.layers[1].mlp.up_proj.weight = lm.backbone.layers[0].mlp.up_proj.weight
    with pytest.raises(NekoLeanError, match="share parameters"):
        verify_layer_pass(lm, decoder_layers(lm), plain_gradients(lm))


def test_a_model_that_cannot_be_checkpointed_is_trained_plainly(monkeypatch, capsys):
    monkeypatch.setattr(backward, "checkpoint_activations", lambda model: [])
    recipe, _ = select_backward(gpt2(), load_recipe("neko"), CPU)
    assert recipe.backward == "plain"
    assert (
        "falling back to backward=plain" in (err := capsys.readouterr().err)
        and "no layers that can be checkpointed." in err
    )


def test_a_model_that_cannot_be_trained_is_refused():
    lm = llama()
    lm.backbone.layers[0].register_forward_hook(lambda module, args, out: out.detach().numpy() and out)
    with pytest.raises(NekoLeanError, match="LlamaForCausalLM fails"):
        select_backward(lm, load_recipe("neko"), CPU)


@pytest.mark.parametrize("make", [gpt2, opt])
def test_checkpointed_gradients_are_the_plain_ones_without_dropout(make):
    lm = make()
    lm.model.eval()
    ids, upstream = torch.arange(10)[None] + 3, torch.randn(10, lm.head.shape[1])

    def gradients():
        lm.model.zero_grad()
        lm.hidden(ids)[0].backward(upstream)
        return {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}

    expected = gradients()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.numel()) or t, lambda t: t):
        lm.hidden(ids)
    plain = sum(stored)
    assert len(checkpoint_activations(lm.model)) == 2
    stored.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.numel()) or t, lambda t: t):
        lm.hidden(ids)
    assert sum(stored) < plain / 3
    torch.testing.assert_close(gradients(), expected)


def test_train_last_freezes_embeddings_and_projections_before_the_layers():
    lm = opt()
    select_backward(lm, dataclasses.replace(load_recipe("neko"), train_last=1), CPU)
    learning = {name for name, p in lm.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in learning if ".layers." in name} == {"1"}
    outside = {name for name in learning if ".layers." not in name}
    assert not any("embed" in name or "project_in" in name for name in outside)
    assert any("project_out" in name for name in outside)
