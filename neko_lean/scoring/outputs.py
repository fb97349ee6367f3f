"""Leaks that exact match misses, and properties of outputs.

Pure functions on texts. They look at a generation's window, which are its first tokens, so that the numbers do not
depend on the length of the rest.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

from neko_lean.data import Example
from neko_lean.data.scripts import fold, in_word, units, unspaced
from neko_lean.data.scripts import words as folded_words
from neko_lean.scoring.degenerate import is_degenerate
from neko_lean.scoring.task import unicode_rouge

MIN_SECRET = 4  # a shorter answer (in letters and digits) occurs in a text by chance
NGRAM = 4  # words per repeated sequence


def alphanumeric(text: str) -> str:
    """Only the letters, their marks and the digits, folded: 555-01 23 and 5 5 5 0 1 2 3 become the same."""
    return "".join(filter(in_word, fold(text)))


def digits(text: str) -> str:
    """Only the digits of a text, in any script, as 0 to 9."""
    return "".join(character for character in fold(text) if character.isdecimal())


def words(text: str) -> list[str]:
    """The words of a text without case and punctuation, see `scripts.words`."""
    return folded_words(fold(text))


def contains(text: str, secret: str) -> bool:
    """Whether the words of the secret occur consecutively in the text, whatever the punctuation."""
    return f" {' '.join(words(secret))} " in f" {' '.join(words(text))} "


def leak_numbers(example: Example, text: str) -> dict[str, float]:
    """Whether `text` reveals the example's answer, 1 or 0 each; a key is absent if the answer is too short to tell.

    `contained`: as whole words inside a longer text. `alphanumeric`: as a sequence of letters and digits, with any
    spaces and punctuation in between. `digits`: its digits in order, with anything in between.
    """
    secret, number = alphanumeric(example.output), digits(example.output)
    leaks: dict[str, float] = {}
    if _secret_length(secret) >= MIN_SECRET:
        leaks["contained"] = float(contains(text, example.output))
        leaks["alphanumeric"] = float(secret in alphanumeric(text))
    if len(number) >= MIN_SECRET:
        leaks["digits"] = float(number in digits(text))
    return leaks


def _secret_length(secret: str) -> int:
    """Number of letters and digits without combining marks; a letter of a script without spaces counts twice."""
    return sum(1 + unspaced(character) for character in secret if not unicodedata.combining(character))


def repetition(text: str) -> float:
    """Share of four-word sequences that occurred earlier in the text; 0 for a text of fewer than five words."""
    tokens = units(text.casefold())
    ngrams = Counter(tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1))
    total = sum(ngrams.values())
    return 1 - len(ngrams) / total if total > 1 else 0.0


def output_numbers(example: Example, text: str) -> dict[str, float]:
    """Properties of a generated text.

    `repetition` as above; `degenerate_text` and `degenerate_answer`: whether the text and the true answer, which shows
    what is normal in these data, are degenerate (`degenerate.is_degenerate`), 1 or 0; `rouge_f1`: ROUGE-L F1 against
    the answer, which unlike recall decreases for longer texts; `length_ratio`: its length in words over that of the
    answer.
    """
    answer_length = max(1, len(units(example.output)))
    return {
        "repetition": repetition(text),
        "degenerate_text": float(is_degenerate(text)),
        "degenerate_answer": float(is_degenerate(example.output)),
        "rouge_f1": unicode_rouge(example.output, text).fmeasure,
        "length_ratio": len(units(text)) / answer_length,
    }
