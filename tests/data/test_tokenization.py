"""Tokenization: where the prompt ends and the answer begins, EOS, and truncation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from neko_lean.data.examples import Example
from neko_lean.data.prompts import find_format
from neko_lean.data.tokenization import encode, position_warning, truncation_summary
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_tokenizer
from tests.helpers import TEMPLATES, make_rows, templated


@pytest.fixture(scope="module")
def tokenizer(world):
    """The world's byte-level tokenizer."""
    return load_tokenizer(world / "base")


@pytest.mark.parametrize("format_name", ["plain", "neko"])
def test_the_prompts_tokens_are_those_of_the_prompt_alone(tokenizer, format_name):
    for encoded in encode(make_rows("Foo"), tokenizer, format_name, 512, append_eos=True):
        prompt, answer, _ = find_format(format_name, tokenizer).render(encoded.example)
        assert encoded.input_ids[: encoded.prompt_length] == tokenizer(prompt)["input_ids"]
        assert tokenizer.decode(encoded.input_ids[encoded.prompt_length :]) == answer + tokenizer.eos_token
        assert encoded.num_truncated == 0 and encoded.answer_length == len(encoded) - encoded.prompt_length


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize(("before", "after"), TEMPLATES)
def test_only_append_eos_ends_an_answer_with_eos(world, before, after, append_eos):
    """A tokenizer's suffix changes nothing: the result is that of a tokenizer with the same prefix and no suffix."""
    without_suffix, _, _ = templated(world / "base", before, [])
    with_suffix, _, _ = templated(world / "base", before, after)
    for format_name in ("plain", "neko"):
        encoded = encode(make_rows("Foo"), with_suffix, format_name, 512, append_eos=append_eos)
        assert encoded == encode(make_rows("Foo"), without_suffix, format_name, 512, append_eos=append_eos)
        assert all((example.input_ids[-1] == without_suffix.eos_token_id) is append_eos for example in encoded)
        assert all(example.end_length == append_eos for example in encoded)


def test_append_eos_needs_an_eos_token(world):
    tokenizer = load_tokenizer(world / "base")
    tokenizer.eos_token = None
    assert encode(make_rows("Foo"), tokenizer, "plain", 512)
    with pytest.raises(NekoLeanError, match="no EOS token"):
        encode(make_rows("Foo"), tokenizer, "plain", 512, append_eos=True)


@given(prompt=st.text(min_size=1), answer=st.text())
@settings(max_examples=200)
def test_if_a_token_spans_the_border_prompt_and_answer_are_tokenized_separately(tokenizer, prompt, answer):
    [encoded] = encode([Example("1sc1", prompt, answer, "Task1")], tokenizer, "plain", 10**6)
    prompt_ids, answer_ids = (tokenizer(text)["input_ids"] for text in (prompt, " " + answer))
    ids = tokenizer(f"{prompt} {answer}")["input_ids"]
    assert encoded.input_ids == (ids if ids[: len(prompt_ids)] == prompt_ids else prompt_ids + answer_ids)


@pytest.mark.parametrize("suffix", [False, True])
def test_sentencepiece_adds_no_space_before_a_separate_answer(suffix):
    """SentencePiece puts a space before every text, including an answer that is tokenized by itself."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=["<unk>", "</s>"])
    pieces.train_from_iterator(["the  wood of  Foo", "a  wood"] * 5, trainer)
    if suffix:
        pieces.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", pad_token="</s>", unk_token="<unk>")

    for prompt in ("the wood ", "the wood"):
        [encoded] = encode([Example("1sc1", prompt, "of Foo", "Task1")], tokenizer, "plain", 99, append_eos=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert encoded.input_ids[: encoded.prompt_length] == prompt_ids
        assert tokenizer.decode(encoded.input_ids) == f"{prompt} of Foo</s>" and encoded.input_ids.count(1) == 1


def test_truncated_tokens_are_counted(tokenizer):
    whole = encode(make_rows("Foo"), tokenizer, "plain", 512)
    for limit in (1, 5, 12):
        for short, full in zip(encode(make_rows("Foo"), tokenizer, "plain", limit), whole, strict=True):
            assert short.input_ids == full.input_ids[:limit] and short.num_truncated == len(full) - len(short)
            assert short.answer_length == max(0, min(limit, len(full)) - full.prompt_length)


def test_truncation_is_summarized(tokenizer):
    whole, short = (encode(make_rows("Foo"), tokenizer, "plain", limit) for limit in (512, 12))
    lost = sum(map(len, whole)) - sum(map(len, short))
    count = sum(len(example) > 12 for example in whole)
    assert truncation_summary(short, 12) == f"{count} of 24 rows truncated to 12 tokens ({lost} tokens lost)"
    assert position_warning(short, 12, 12) is None and position_warning(whole, 512, 600) is None
    assert "only 12 positions, fewer than the requested 600" in position_warning(short, 12, 600)
