"""Backbone, head and logit transform are detected by running a model."""

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.models.families import detect_logit_transform, find_backbone, linear_head
from neko_lean.models.predictions import next_token_logp
from tests.helpers import SIZES
from tests.models.families import random_family_model

GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
CTRL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 48}
RECURRENT_GEMMA = {"head_dim": 8, "lru_width": 32, "num_hidden_layers": 3, "logits_soft_cap": 5.0}
# Config class: changes to SIZES, then the expected scale, soft cap and whether the head has a bias.
TRANSFORMS = {
    "Llama": ({}, 1.0, None, False),
    "Gemma2": ({"head_dim": 8, "final_logit_softcapping": 3.0}, 1.0, 3.0, False),
    "RecurrentGemma": (RECURRENT_GEMMA, 1.0, 5.0, False),
    "Cohere": ({"logit_scale": 0.0625}, 0.0625, None, False),
    "Cohere2": ({"logit_scale": 0.99}, 0.99, None, False),  # near 1
    "Granite": ({"logits_scaling": 7.0}, 1 / 7, None, False),
    "Phi": ({}, 1.0, None, True),
    "GPTJ": (GPTJ, 1.0, None, True),
    "CTRL": (CTRL, 1.0, None, True),
    "Mamba": ({"state_size": 4}, 1.0, None, False),
    "OPT": ({"ffn_dim": 48, "word_embed_proj_dim": 16}, 1.0, None, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_log_probabilities_are_those_of_the_models_own_forward(name, dtype):
    sizes, scale, softcap, has_bias = TRANSFORMS[name]
    model = random_family_model(name, dtype, **sizes)
    lm = as_causal_lm(model)
    assert (lm.scale, lm.softcap, lm.transform.bias is not None) == (pytest.approx(scale), softcap, has_bias)

    sequences = [[5, 9, 2, 7, 11, 30], [8, 3, 90]]
    actual = next_token_logp(lm, sequences, 0)
    expected = []
    for ids in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        expected.append(logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(actual, torch.cat(expected), rtol=tolerance, atol=tolerance)


def test_an_unknown_logit_transform_is_refused_in_every_dtype():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 1e-3 * out.logits.roll(1, -1)
            return out

    for dtype in (torch.float32, torch.bfloat16):
        model = Odd(random_family_model("Llama").config).to(dtype)
        with pytest.raises(NekoLeanError, match="changes its logits by something other than a bias"):
            as_causal_lm(model)


def test_a_head_that_is_not_linear_is_refused():
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True))
    with pytest.raises(NekoLeanError, match="its output embedding is not the last hidden state of any submodule"):
        as_causal_lm(model)
    model = random_family_model("Llama")
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, 96)))
    with pytest.raises(NekoLeanError, match="not a Linear"):
        linear_head(model)


def test_output_switches_in_the_config_have_no_effect():
    plain = random_family_model("Llama")
    switched = random_family_model("Llama", return_dict=False, output_attentions=True)
    sequences = [[5, 9, 2, 7], [3, 4]]
    expected = next_token_logp(as_causal_lm(plain), sequences, 0)
    assert torch.equal(next_token_logp(as_causal_lm(switched), sequences, 0), expected)


def test_the_backbone_is_found_with_fake_tensors():
    with FakeTensorMode():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        assert find_backbone(model) is model.model


def test_a_scale_near_one_is_not_rounded_to_one():
    model = random_family_model("Cohere", logit_scale=1.01)
    assert detect_logit_transform(model, model.model) == (1.01, None)
