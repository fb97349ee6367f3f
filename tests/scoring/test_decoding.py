"""The three decoding loops pass on the same logits, and rows may end at any step."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.scoring.decoding import Prompts, decode_cached, decode_full, decode_padded

LENGTHS = {0: 3, 1: 1, 2: 6, 3: 4}  # tokens of each row; the batch may run to 6


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return as_causal_lm(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval())


def run(decode, lm, prompts):
    """Greedy tokens and logits of each row."""
    tokens = {row: [] for row in LENGTHS}
    seen = {row: [] for row in LENGTHS}

    def choose(rows, scores):
        assert scores.shape == (len(rows), 50)
        for row, own in zip(rows, scores, strict=True):
            seen[row].append(own)
            tokens[row].append(int(own.argmax()))
        return [tokens[row][-1] if len(tokens[row]) < LENGTHS[row] else None for row in rows]

    decode(lm, Prompts(prompts, 0, 6), choose)
    assert {row: len(own) for row, own in tokens.items()} == LENGTHS
    return tokens, torch.stack([own for row in LENGTHS for own in seen[row]])


@pytest.mark.parametrize("decode", [decode_padded, decode_cached])
def test_loops_agree(lm, decode):
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [20, 3, 4, 44], [31, 30, 2, 1]]
    wanted, logits = run(decode_full, lm, prompts)
    found, others = run(decode, lm, prompts)
    assert found == wanted
    torch.testing.assert_close(others, logits, atol=1e-5, rtol=1e-5)


def test_padded_batch_equals_single_prompts(lm):
    prompts = [[5, 6, 7, 8, 9, 10, 11], [9], [20, 3, 4], [31, 30]]
    found, logits = run(decode_padded, lm, prompts)
    for row, prompt in enumerate(prompts):
        tokens = []
        for step in range(LENGTHS[row]):
            with torch.no_grad():
                own = lm.model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1]
            torch.testing.assert_close(logits[sum(list(LENGTHS.values())[:row]) + step], own, atol=1e-5, rtol=1e-5)
            tokens.append(int(own.argmax()))
        assert found[row] == tokens


@pytest.mark.parametrize("decode", [decode_padded, decode_cached, decode_full])
def test_maximum_number_of_new_tokens(lm, decode):
    steps = []
    decode(lm, Prompts([[5, 6]], 0, 4), lambda rows, scores: steps.append(rows) or [7 for _ in rows])
    assert len(steps) == 4
