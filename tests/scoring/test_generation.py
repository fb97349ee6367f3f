"""Batched greedy decoding equals decoding one row at a time, whatever the checkpoint's own config says."""

import pytest
import torch

from neko_lean.data import read_rows
from neko_lean.modeling import load_model, load_tokenizer
from neko_lean.scoring.generation import generate
from tests.helpers import LUME, make_rows, random_model


def one_at_a_time(lm, tokenizer, prompts, most):
    """The naive reference: no batch, no cache, no generate()."""
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        new = []
        while len(new) < most:
            with torch.no_grad():
                token = lm.model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item()
            new.append(token)
            if token == tokenizer.eos_token_id:
                break
        texts.append(cleaned_up(tokenizer.decode(new, skip_special_tokens=True)))
    return texts


def cleaned_up(text):
    """What transformers 4, with which the task was scored, did to spaces."""
    for found in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(found, found.strip())
    return text


def prompts():
    rows = make_rows("Foo", 6)
    if LUME.is_dir():
        rows += read_rows(LUME, "forget", "validation")[::16]
    return [row.input for row in rows]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_equal_single_rows(world, tmp_path, batch_size):
    lm = load_model(random_model(world, tmp_path / "m", seed=3, scale=5.0), torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(tmp_path / "m")
    # Make EOS a likely choice for some hidden states, so that rows of a batch end at different lengths.
    with torch.no_grad():
        lm.head[tokenizer.eos_token_id] = lm.head[200:215].mean(0) * 3
    texts = prompts()
    wanted = one_at_a_time(lm, tokenizer, texts, 12)
    assert generate(lm, tokenizer, texts, batch_size=batch_size, max_new_tokens=12) == wanted
    assert len({len(tokenizer(t)["input_ids"]) for t in wanted}) > 1


def test_the_checkpoints_own_generation_config_is_not_used(world, tmp_path):
    from transformers import GenerationConfig

    folder = random_model(world, tmp_path / "m", seed=3, scale=5.0)
    GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=3.0, max_length=5, num_beams=4
    ).save_pretrained(folder)
    lm = load_model(folder, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(folder)
    texts = prompts()[:6]
    assert generate(lm, tokenizer, texts, batch_size=4, max_new_tokens=10) == one_at_a_time(lm, tokenizer, texts, 10)


def test_spaces_are_cleaned_up_and_special_tokens_dropped(world, tmp_path, monkeypatch):
    folder = random_model(world, tmp_path / "m")
    lm = load_model(folder, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(folder)
    said = tokenizer("It is n't here , is it ? " + tokenizer.eos_token)["input_ids"]
    monkeypatch.setattr(lm.model, "generate", lambda ids, **_: torch.cat([ids, torch.tensor([said])], dim=1))
    assert generate(lm, tokenizer, ["x"], batch_size=1, max_new_tokens=9) == ["It isn't here, is it? "]
