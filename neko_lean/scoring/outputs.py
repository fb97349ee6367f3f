"""What a generation gives away that exact match misses, and whether it is language at all.

Pure functions on texts. They look at a generation's window, its first tokens, so that they mean the same however long
the rest is.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

from neko_lean.data import Example
from neko_lean.scoring.scripts import fold, in_word, units, unspaced
from neko_lean.scoring.scripts import words as words_of
from neko_lean.scoring.task import unicode_rouge

MIN_SECRET = 4  # letters and digits below which finding an answer in a text says nothing


GRAM = 4  # words of a repetition


def alphanumeric(text: str) -> str:
    """Letters, their marks and digits alone, folded: what is left of 555-01 23 and of 5 5 5 0 1 2 3 is the same."""
    return "".join(filter(in_word, fold(text)))


def digits(text: str) -> str:
    """The digits of a text, of any script, as 0 to 9."""
    return "".join(letter for letter in fold(text) if letter.isdecimal())


def words(text: str) -> list[str]:
    """Words without case and punctuation, as `scripts.words` has them."""
    return words_of(fold(text))


def contains(text: str, secret: str) -> bool:
    """Whether the secret's words stand in the text, one after the other, whatever is around and between them."""
    return f" {' '.join(words(secret))} " in f" {' '.join(words(text))} "


def leak_numbers(row: Example, text: str) -> dict[str, float]:
    """Whether `text` gives the row's answer away, 1 or 0 each; a key is absent where the answer is too short to tell.

    `contained`: as whole words inside a longer text. `alphanumeric`: as a run of letters and digits, with any spaces
    and dashes between them. `digits`: its digits in order, with anything else between them.
    """
    secret, number = alphanumeric(row.output), digits(row.output)
    found: dict[str, float] = {}
    if _length(secret) >= MIN_SECRET:
        found["contained"] = float(contains(text, row.output))
        found["alphanumeric"] = float(secret in alphanumeric(text))
    if len(number) >= MIN_SECRET:
        found["digits"] = float(number in digits(text))
    return found


def _length(secret: str) -> int:
    """Letters and digits without their marks; a sign of a script without spaces says as much as two."""
    return sum(1 + unspaced(sign) for sign in secret if not unicodedata.combining(sign))


def repetition(text: str) -> float:
    """Share of a text's runs of four words that occurred in it before; 0 for one of fewer than five words."""
    said = units(text.casefold())
    grams = Counter(tuple(said[i : i + GRAM]) for i in range(len(said) - GRAM + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total > 1 else 0.0


def degenerate(text: str) -> bool:
    """Whether a text is empty, or one word or one sign again and again (at least three times)."""
    said = units(text)
    signs = "".join(said)
    if not signs:
        return True
    return (len(said) >= 3 and len(set(said)) == 1) or (len(signs) >= 6 and len(set(signs)) == 1)


def output_numbers(row: Example, text: str) -> dict[str, float]:
    """What a text is like: repetition, whether it is degenerate, ROUGE-L F1 against the answer (which, unlike recall,
    longer text does hurt), and its length as a multiple of the answer's, in words."""
    answer = max(1, len(units(row.output)))
    return {
        "repetition": repetition(text),
        "degenerate": float(degenerate(text)),
        "rouge_f1": unicode_rouge(row.output, text).fmeasure,
        "length_ratio": len(units(text)) / answer,
    }
