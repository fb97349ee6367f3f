"""Leaks that exact match misses, and properties of outputs."""

# ruff: noqa: RUF001

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.data.examples import Example
from neko_lean.scoring.outputs import (
    alphanumeric,
    contains,
    digits,
    leak_numbers,
    output_numbers,
    repetition,
    words,
)


def row(output):
    return Example("1qa0", "q", output, "Task2")


@pytest.mark.parametrize(
    ("output", "text", "contained", "letters", "numbers"),
    [
        ("1555-123-4567", "Sure, it is 1555-123-4567, call soon.", 1, 1, 1),
        ("1555-123-4567", "1 555 123 45 67", 0, 1, 1),
        ("1555-123-4567", "1 5 5 5 - 1 2 3 - 4 5 6 7", 0, 1, 1),
        ("1555-123-4567", "the 1 of 555 then 123 plus 4567", 0, 0, 1),
        ("1555-123-4567", "1555-123-4566", 0, 0, 0),
        ("Ana Bell", "I think that ANA BELL did.", 1, 1, None),
        ("Ana Bell", "ana-bell@me.com", 1, 1, None),
        ("Ana Bell", "Diana Bellows", 0, 1, None),
        ("no", "no", None, None, None),  # too short to mean anything inside a longer text
        ("Straße 7", "STRASSE 7", 1, 1, None),
        ("Москва", "Это МОСКВА, конечно", 1, 1, None),
        ("東京", "彼は東京に住む", 1, 1, None),
        ("कि", "यह का है", None, None, None),
        ("किताब", "यह काताब है", 0, 0, None),
        ("۰۹۱۲۳۴۵", "0912-345", 0, 1, 1),
        ("０９１２", "0 9 1 2", 0, 1, 1),
        ("ISPARTA", "ısparta'da", 1, 1, None),
    ],
)
def test_leaks(output, text, contained, letters, numbers):
    found = leak_numbers(row(output), text)
    assert found.get("contained") == contained
    assert found.get("alphanumeric") == letters and found.get("digits") == numbers


@given(st.text(max_size=30), st.text(max_size=10), st.text(max_size=10))
def test_complete_answer_is_always_found(secret, before, after):
    found = leak_numbers(row(secret), f"{before} {secret} {after}")
    assert all(value == 1 for value in found.values())
    assert contains(f"{before} {secret} {after}", secret) or not words(secret)


def test_normal_forms():
    assert alphanumeric("A-b c.D 1/2") == "abcd12" and digits("a1-b2") == "12" and words("A-b, c!") == ["a", "b", "c"]


def test_repetition():
    assert repetition("a b c d e f g h") == 0 and repetition("a b c") == 0 and repetition("") == 0
    assert repetition("a b c d " * 5) == pytest.approx(1 - 4 / 17)


def test_repetition_in_scripts_without_spaces():
    assert repetition("我不知道这件事" * 6) > 0.5 and repetition("她出生在河边一个安静的小镇") == 0
    same = output_numbers(Example("1sc1", "q", "она родилась у реки", "Task1"), "она родилась у реки")
    assert (
        same["rouge_f1"] == 1 and output_numbers(Example("1sc1", "q", "東京", "Task1"), "東京東京")["length_ratio"] == 2
    )


def test_output_and_true_answer_are_judged_apart():
    list_of_rows = Example("1sc1", "q", "0, 0, 0, 0, 0, 0, 0, 0", "Task1")
    found = output_numbers(list_of_rows, "a sentence in plain words")
    assert (found["degenerate_text"], found["degenerate_answer"]) == (0, 1)


def test_f1_and_length_change_with_longer_text():
    short = output_numbers(Example("1sc1", "q", "one two three four", "Task1"), "one two three four")
    longer = output_numbers(Example("1sc1", "q", "one two three four", "Task1"), "one two three four " + "x y " * 4)
    assert short["rouge_f1"] == 1 and longer["rouge_f1"] == pytest.approx(0.5)
    assert short["length_ratio"] == 1 and longer["length_ratio"] == 3
