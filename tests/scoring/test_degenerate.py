"""Degenerate text: hand-labelled outputs, and each measure on its own."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.scoring.degenerate import (
    compression,
    distinct_pairs,
    distinct_share,
    has_long_run,
    is_degenerate,
    joined_share,
    mean_letters,
    run_share,
    stutter_share,
    tokenize,
    unreadable_share,
)

LABELLED = [json.loads(line) for line in (Path(__file__).parent / "labelled_outputs.jsonl").read_text().splitlines()]
CHOSEN_ON, REPORTED_ON = LABELLED[::2], LABELLED[1::2]


@pytest.mark.parametrize("rows", [CHOSEN_ON, REPORTED_ON], ids=["thresholds chosen on", "other half"])
@pytest.mark.parametrize("label", [True, False])
def test_labelled_outputs_are_judged_as_a_reader_would(rows, label):
    texts = [row["text"] for row in rows if row["degenerate"] is label]
    wrong = [text for text in texts if is_degenerate(text) is not label]
    assert len(texts) >= 30 and len(wrong) <= 0.05 * len(texts), wrong


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "!!!!!!!!",
        "the the the the the the",
        " the the the the the,,,,, a to the the the",
        "the of and to in a is that it was for on",
        "好好好好好好",
        "\ufffd1*\x03\ufffd\ufffd",
        "'s phone number?'s ID number?'s phone number?'s",
        "It was built in 1898. " + "It is a river. " * 8,
    ],
)
def test_broken_texts(text):
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "555-0123",
        "Mira Tern",
        "No.",
        "the the",
        "東京",
        "Москва",
        "5 6 5 6",
        "555-555-0123",
        "She was born in a small town.\ufffd",
    ],
)
def test_short_answers_and_truncated_characters_are_sensible(text):
    assert not is_degenerate(text)


@given(st.text(max_size=60))
def test_any_text_is_judged_and_five_copies_of_it_are_degenerate(text):
    assert isinstance(is_degenerate(text), bool)
    if len(tokenize(text)) > 1:
        assert is_degenerate(f"{text}\n" * 40)


def test_tokens_are_words_marks_and_empty_lines():
    assert tokenize("It's 東京, no?\n\n\nYes") == ["it", "'", "s", "東", "京", ",", "no", "?", "\n", "\n", "yes"]
    assert tokenize("") == [] and tokenize("a\nb") == ["a", "b"]


def test_each_measure():
    assert unreadable_share("ab\x00\ufffd") == 0.5 and unreadable_share("a\n\tb") == 0 == unreadable_share("")
    assert has_long_run([",", ",", ",", ","]) and not has_long_run(["no", "no", "no", "no", "-", "-", "-", "-"])
    assert run_share(list("aaab--")) == pytest.approx(1 / 3) and run_share(list("aa-a-a")) == 0 == run_share([])
    assert joined_share("number?'s isWhat thisOne, 3,5", 4) == 0.5  # one of the two words in others is allowed
    assert compression(["ab"] * 60) > 5 and compression([]) == 0
    assert distinct_share(list("abab")) == 0.5 and distinct_share(list("ab" * 20 + "cdefghijklmnopq")) == 2 / 16
    assert distinct_pairs(list("ababa")) == 0.5 and distinct_pairs(["a"]) == 1
    assert stutter_share(list("aaaabc")) == pytest.approx(1 / 6) and stutter_share(["very", "very"]) == 0
    assert mean_letters(["ab"] * 8) == 2 and mean_letters(["ab"] * 7) == float("inf")
