"""What is found of a family by running it: its logits, whether it is causal, its positions."""

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.models.families import detect_logit_transform, find_backbone, linear_head
from neko_lean.models.loading import usable_length
from neko_lean.models.positions import embeddable_positions
from neko_lean.models.predictions import next_token_logp
from tests.helpers import SIZES

CPU = torch.device("cpu")
# Config class, model class, and what differs from SIZES; then scale, soft cap, whether the head has a bias.
TRANSFORMS = {
    "Llama": ({}, 1.0, None, False),
    "Gemma2": ({"head_dim": 8, "final_logit_softcapping": 3.0}, 1.0, 3.0, False),
    "RecurrentGemma": (
        {"head_dim": 8, "lru_width": 32, "num_hidden_layers": 3, "logits_soft_cap": 5.0},
        1.0,
        5.0,
        False,
    ),
    "Cohere": ({"logit_scale": 0.0625}, 0.0625, None, False),
    "Cohere2": ({"logit_scale": 0.99}, 0.99, None, False),  # near 1
    "Granite": ({"logits_scaling": 7.0}, 1 / 7, None, False),
    "Phi": ({}, 1.0, None, True),
    "GPTJ": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, 1.0, None, True),
    "CTRL": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 48}, 1.0, None, True),
    "Mamba": ({"state_size": 4}, 1.0, None, False),
    "OPT": ({"ffn_dim": 48, "word_embed_proj_dim": 16}, 1.0, None, False),
}
MODELS = {"CTRL": "CTRLLMHeadModel"}


def family(name, dtype=torch.float32, **more):
    """A random model whose logits are far enough from 0 for a soft cap to bite."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **TRANSFORMS.get(name, ({},))[0], **more})
    torch.manual_seed(0)
    model = getattr(transformers, MODELS.get(name, f"{name}ForCausalLM"))(config)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(30)
        if head.bias is not None:
            head.bias.normal_()
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_log_probabilities_are_those_of_the_models_own_forward(name, dtype):
    _, scale, softcap, biased = TRANSFORMS[name]
    model = family(name, dtype)
    lm = as_causal_lm(model)
    assert (lm.scale, lm.softcap, lm.transform.bias is not None) == (pytest.approx(scale), softcap, biased)
    rows = [[5, 9, 2, 7, 11, 30], [8, 3, 90]]
    got = next_token_logp(lm, rows, 0)
    wanted = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
        wanted.append(logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got, torch.cat(wanted), rtol=tolerance, atol=tolerance)


def test_an_unknown_change_of_the_logits_is_refused_in_every_dtype():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 1e-3 * out.logits.roll(1, -1)
            return out

    for dtype in (torch.float32, torch.bfloat16):
        model = Odd(family("Llama").config).to(dtype)
        with pytest.raises(NekoLeanError, match="changes its logits by something other than a bias"):
            as_causal_lm(model)


def test_a_head_that_is_more_than_a_matrix_is_refused():
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True))
    with pytest.raises(NekoLeanError, match="is not the last hidden state of any submodule"):
        as_causal_lm(model)
    model = family("Llama")
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, 96)))
    with pytest.raises(NekoLeanError, match="not a Linear"):
        linear_head(model)


def test_config_switches_that_change_what_a_forward_returns_change_nothing():
    plain, switched = family("Llama"), family("Llama", return_dict=False, output_attentions=True)
    rows = [[5, 9, 2, 7], [3, 4]]
    assert torch.equal(next_token_logp(as_causal_lm(plain), rows, 0), next_token_logp(as_causal_lm(switched), rows, 0))


def test_attention_that_is_not_causal_is_refused():
    config = transformers.BertGenerationConfig(**SIZES, is_decoder=False)
    with pytest.raises(NekoLeanError, match="its attention is not causal"):
        as_causal_lm(transformers.BertGenerationDecoder(config))
    as_causal_lm(transformers.BertGenerationDecoder(transformers.BertGenerationConfig(**SIZES, is_decoder=True)))


def test_a_model_that_sees_its_padding_is_refused():
    config = transformers.CpmAntConfig(
        vocab_size=96, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2,
        prompt_length=4, prompt_types=2, segment_types=2, position_bias_num_buckets=8, position_bias_max_distance=16,
    )  # fmt: skip
    with pytest.raises(NekoLeanError, match="CpmAntForCausalLM is not supported"):
        as_causal_lm(transformers.CpmAntForCausalLM(config))


@pytest.mark.parametrize(
    ("name", "more", "limit"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 64),
        ("OPT", {"max_position_embeddings": 64}, 64),
        ("GPTNeo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, 64),
        ("Bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}, 64),
        ("GPTJ", {"n_positions": 64}, 64),
        ("CTRL", {}, 64),
        ("BioGpt", {}, 64),
        ("Llama", {}, None),
        ("Bloom", {"n_layer": 2, "n_head": 4}, None),
        ("Mamba", {}, None),
    ],
)
def test_positions_end_where_a_longer_row_fails(name, more, limit, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "GPT2", "GPT2LMHeadModel")
    model = family(name, **{"max_position_embeddings": 64, **more})
    lm = as_causal_lm(model)
    assert lm.max_positions == limit == embeddable_positions(model, model.config)
    length = 80
    row = torch.ones(1, limit or length, dtype=torch.int64)
    with torch.no_grad():
        assert lm.hidden(row).isfinite().all()
        if limit is not None:
            with pytest.raises(NekoLeanError, match=r"a row has 80 tokens, but .* has only 64 positions"):
                lm.hidden(torch.ones(1, length, dtype=torch.int64))
    model.config.save_pretrained(tmp_path)
    assert usable_length(tmp_path, length) == (limit or length) and usable_length(tmp_path, 20) == 20


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_no_row_is_long_enough_to_change_the_positions_of_its_neighbours(scaling, tmp_path):
    """Beyond the length that the model was first trained with, its rotary embeddings follow a batch's longest row."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4} if scaling == "longrope" else {}
    rope = {"rope_type": scaling, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, **factors}
    model = family("Llama", max_position_embeddings=128, rope_parameters=rope)
    lm = as_causal_lm(model)
    model.config.save_pretrained(tmp_path)
    assert lm.max_positions == 32 and usable_length(tmp_path, 100) == 32

    short = [5, 9, 2, 7, 11, 30]
    alone = next_token_logp(lm, [short], 0)
    beside = next_token_logp(lm, [short, [3] * 32], 0)[: len(alone)]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)


def test_the_parts_are_found_without_storage():
    with FakeTensorMode():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        assert find_backbone(model) is model.model


def test_a_scale_near_one_is_not_taken_for_one():
    model = family("Cohere", logit_scale=1.01)
    assert detect_logit_transform(model, model.model) == (1.01, None)


def test_a_model_that_sees_padding_beyond_one_chunk_is_refused():
    sizes = {"hidden_size": 32, "attn_layers": ["lsh", "local"], "feed_forward_size": 32, "num_attention_heads": 2}
    sizes |= {"attention_head_size": 16, "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16, "is_decoder": True}
    sizes |= {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16), "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = transformers.ReformerModelWithLMHead(transformers.ReformerConfig(vocab_size=96, **sizes))
    with pytest.raises(NekoLeanError, match="ReformerModelWithLMHead is not supported"):
        as_causal_lm(model)
