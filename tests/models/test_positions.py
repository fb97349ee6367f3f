"""Non-causal models are refused, and the number of positions is where longer sequences fail."""

import pytest
import torch
import transformers

from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.models.loading import usable_length
from neko_lean.models.positions import embeddable_positions
from neko_lean.models.predictions import next_token_logp
from tests.helpers import SIZES
from tests.models.families import random_family_model
from tests.models.test_families import TRANSFORMS


def test_non_causal_attention_is_refused():
    config = transformers.BertGenerationConfig(**SIZES, is_decoder=False)
    with pytest.raises(NekoLeanError, match=r"its attention is not causal.*set is_decoder to true in config.json"):
        as_causal_lm(transformers.BertGenerationDecoder(config))
    as_causal_lm(transformers.BertGenerationDecoder(transformers.BertGenerationConfig(**SIZES, is_decoder=True)))


def test_a_model_that_sees_its_padding_is_refused():
    config = transformers.CpmAntConfig(
        vocab_size=96, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2,
        prompt_length=4, prompt_types=2, segment_types=2, position_bias_num_buckets=8, position_bias_max_distance=16,
    )  # fmt: skip
    with pytest.raises(NekoLeanError, match="CpmAntForCausalLM is not supported"):
        as_causal_lm(transformers.CpmAntForCausalLM(config))


def test_a_model_that_sees_padding_beyond_one_chunk_is_refused():
    sizes = {"hidden_size": 32, "attn_layers": ["lsh", "local"], "feed_forward_size": 32, "num_attention_heads": 2}
    sizes |= {"attention_head_size": 16, "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16, "is_decoder": True}
    sizes |= {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16), "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = transformers.ReformerModelWithLMHead(transformers.ReformerConfig(vocab_size=96, **sizes))
    with pytest.raises(NekoLeanError, match="ReformerModelWithLMHead is not supported"):
        as_causal_lm(model)


@pytest.mark.parametrize(
    ("name", "sizes", "limit"),
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
def test_sequences_longer_than_the_positions_fail(name, sizes, limit, tmp_path):
    sizes = {**TRANSFORMS.get(name, ({},))[0], "max_position_embeddings": 64, **sizes}
    model = random_family_model(name, **sizes)
    lm = as_causal_lm(model)
    assert lm.max_positions == limit == embeddable_positions(model, model.config)

    length = 80
    input_ids = torch.ones(1, limit or length, dtype=torch.int64)
    with torch.no_grad():
        assert lm.hidden(input_ids).isfinite().all()
        if limit is not None:
            with pytest.raises(NekoLeanError, match=r"a row has 80 tokens, but .* has only 64 positions"):
                lm.hidden(torch.ones(1, length, dtype=torch.int64))
    model.config.save_pretrained(tmp_path)
    assert usable_length(tmp_path, length) == (limit or length) and usable_length(tmp_path, 20) == 20


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_no_sequence_is_long_enough_to_rescale_its_neighbours(scaling, tmp_path):
    """Beyond the original length, rotary embeddings depend on the longest sequence of a batch."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4} if scaling == "longrope" else {}
    rope = {"rope_type": scaling, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, **factors}
    model = random_family_model("Llama", max_position_embeddings=128, rope_parameters=rope)
    lm = as_causal_lm(model)
    model.config.save_pretrained(tmp_path)
    assert lm.max_positions == 32 and usable_length(tmp_path, 100) == 32

    short = [5, 9, 2, 7, 11, 30]
    alone = next_token_logp(lm, [short], 0)
    batched = next_token_logp(lm, [short, [3] * 32], 0)[: len(alone)]
    torch.testing.assert_close(batched, alone, rtol=1e-4, atol=1e-4)
