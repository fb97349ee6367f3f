"""What a generation gives away that exact match misses, and whether it is language at all.

Pure functions on texts. They look at a generation's window, its first tokens, so that they mean the same however long
the rest is.
"""

from __future__ import annotations

from collections import Counter

from neko_lean.data import Row
from neko_lean.scoring.task import rouge

MIN_SECRET = 4  # letters and digits below which finding an answer in a text says nothing
GRAM = 4  # words of a repetition


def alphanumeric(text: str) -> str:
    """Letters and digits alone, without case: what is left of 555-01 23 and of 5 5 5 0 1 2 3 is the same."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def digits(text: str) -> str:
    """The digits of a text."""
    return "".join(letter for letter in text if letter.isdecimal())


def words(text: str) -> list[str]:
    """Words without case and the marks around them."""
    bare = ("".join(letter if letter.isalnum() else " " for letter in word) for word in text.casefold().split())
    return " ".join(bare).split()


def contains(text: str, secret: str) -> bool:
    """Whether the secret's words stand in the text, one after the other, whatever is around and between them."""
    return f" {' '.join(words(secret))} " in f" {' '.join(words(text))} "


def leak_numbers(row: Row, text: str) -> dict[str, float]:
    """Whether `text` gives the row's answer away, 1 or 0 each; a key is absent where the answer is too short to tell.

    `contained`: as whole words inside a longer text. `alphanumeric`: as a run of letters and digits, with any spaces
    and dashes between them. `digits`: its digits in order, with anything else between them.
    """
    secret, number = alphanumeric(row.output), digits(row.output)
    found: dict[str, float] = {}
    if len(secret) >= MIN_SECRET:
        found["contained"] = float(contains(text, row.output))
        found["alphanumeric"] = float(secret in alphanumeric(text))
    if len(number) >= MIN_SECRET:
        found["digits"] = float(number in digits(text))
    return found


def repetition(text: str) -> float:
    """Share of a text's runs of four words that occurred in it before; 0 for one of fewer than five words."""
    said = text.casefold().split()
    grams = Counter(tuple(said[i : i + GRAM]) for i in range(len(said) - GRAM + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total > 1 else 0.0


def degenerate(text: str) -> bool:
    """Whether a text is empty, or one word or one sign again and again (at least three times)."""
    said = text.split()
    signs = "".join(said)
    if not signs:
        return True
    return (len(said) >= 3 and len(set(said)) == 1) or (len(signs) >= 6 and len(set(signs)) == 1)


def output_numbers(row: Row, text: str) -> dict[str, float]:
    """What a text is like: repetition, whether it is degenerate, ROUGE-L F1 against the answer (which, unlike recall,
    longer text does hurt), and its length as a multiple of the answer's, in words."""
    answer = max(1, len(row.output.split()))
    return {
        "repetition": repetition(text),
        "degenerate": float(degenerate(text)),
        "rouge_f1": rouge(row.output, text).fmeasure,
        "length_ratio": len(text.split()) / answer,
    }
