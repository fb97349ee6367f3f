"""Special tokens: a text keeps the prefix that its tokenizer adds, and loses the suffix."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from neko_lean.data.special_tokens import added_tokens
from neko_lean.data.tokenization import encode_text, encode_texts
from tests.helpers import TEMPLATES, templated


@pytest.mark.parametrize(("before", "after"), TEMPLATES)
def test_a_text_keeps_its_prefix_and_gets_no_suffix(world, before, after):
    tokenizer, prefix, suffix = templated(world / "base", before, after)
    assert added_tokens(tokenizer) == (prefix, suffix)
    texts = ["", "Once Foo0 walked", "ends in </s>", "</s>", "<s>", "<s> begins so</s></s>", "Ж 中 \n"]
    for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        assert ids == prefix + tokenizer(text, add_special_tokens=False)["input_ids"] == encode_text(tokenizer, text)
        assert suffix or ids == tokenizer(text)["input_ids"]
    assert encode_texts(tokenizer, []) == []


def test_a_suffix_that_the_text_itself_contains_is_kept():
    """ByT5 appends EOS only if the text does not already end with it."""
    tokenizer = ByT5Tokenizer()
    assert tokenizer("ab")["input_ids"][-1] == 1 and encode_text(tokenizer, "ab") == [100, 101]
    with pytest.warns(UserWarning, match="already has"):
        assert encode_text(tokenizer, "ab</s>") == [100, 101, 1]


def test_a_vocabulary_without_letters():
    """The token for unknown words is also the token that ends a text."""
    words = Tokenizer(models.WordLevel({"</s>": 0, "foo": 1, "bar": 2}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    assert encode_texts(tokenizer, ["foo x", "x", "", "bar"]) == [[1, 0], [0], [], [2]]
