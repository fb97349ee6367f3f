"""Windows of long documents: every token is predicted exactly once, and nothing is lost."""

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from neko_lean.data import Example, encode, truncation_summary
from neko_lean.recipe import load_recipe
from neko_lean.training.batch import forget_span

TOKENIZER = ByT5Tokenizer()


@settings(max_examples=100)
@given(length=st.integers(1, 400), max_length=st.integers(1, 80))
def test_every_token_of_a_document_gets_one_forget_loss(length, max_length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    [whole] = encode([Example("d", "", text, "all", "document")], TOKENIZER, "plain", 10**6)
    windows = encode([Example("d", "", text, "all", "document")], TOKENIZER, "plain", max_length, windows=True)

    assert all(len(window) <= max_length and window.num_truncated == 0 for window in windows)
    assert len({window.example.id for window in windows}) == len(windows) and windows[0].example.id == "d"
    recipe = load_recipe("calibrated")
    tokens = [windows[0].input_ids[0]]
    for window in windows:
        start, _ = forget_span(window, recipe)
        tokens += window.input_ids[start + 1 :]
    if max_length >= 8:  # below, windows do not overlap, so nothing precedes their first tokens
        assert tokens == whole.input_ids


def test_windows_are_counted_and_prompts_are_not_split():
    document = Example("d", "", "a" * 100, "all", "document")
    question = Example("q", "Who?", "b" * 100, "all", "qa")
    encoded = encode([document, question], TOKENIZER, "plain", 64, windows=True)
    assert [len(example) for example in encoded] == [64, 44, 64]
    assert truncation_summary(encoded, 64) == (
        "1 of 3 rows truncated to 64 tokens (41 tokens lost); 1 long documents split into 2 windows that overlap by 8 "
        "tokens"
    )
