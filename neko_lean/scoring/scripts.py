"""Text in any script: one normal form, words, and single signs where a script writes no spaces between words.

The official ROUGE knows the letters a to z and the digits 0 to 9 alone, so two identical Russian texts score 0 there.
What is here sees all of Unicode, and of plain English text exactly the words that ROUGE sees.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache

from rouge_score.tokenizers import DefaultTokenizer

# Scripts whose words run into each other: each of their letters is a word. First and last code point of their blocks.
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x3005, 0x3007),  # Chinese signs of repetition, and zero
    (0x3040, 0x312F),  # Japanese kana, Bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),  # Chinese characters, as are F900 and from 20000 on
    (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9FF),  # Javanese, more Burmese
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def fold(text: str) -> str:
    """The form in which texts are compared: compatibility decomposition (full-width and ligature forms become plain),
    without case (ß is ss), every decimal digit as 0 to 9, the Turkish dotless i as i, no invisible signs."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return plain if plain.isascii() else "".join(map(_folded, plain)).replace("i\u0307", "i")


@lru_cache(maxsize=2**16)
def _folded(sign: str) -> str:
    kind = unicodedata.category(sign)
    if kind == "Nd":
        return str(unicodedata.decimal(sign))
    return "" if kind == "Cf" else "i" if sign == "\u0131" else sign


@lru_cache(maxsize=2**16)
def in_word(sign: str) -> bool:
    """Whether a character is a letter, a digit, or a combining mark (Hindi vowels are marks)."""
    return unicodedata.category(sign)[0] in "LMN"


@lru_cache(maxsize=2**16)
def unspaced(sign: str) -> bool:
    """Whether a sign is of a script without spaces between words."""
    return any(first <= ord(sign) <= last for first, last in UNSPACED)


def words(text: str) -> list[str]:
    """The words of a folded text: runs of letters, digits and marks; in a script without spaces each letter with its
    marks is one."""
    if text.isascii():
        return re.findall(r"[a-z0-9]+", text)
    found: list[str] = []
    joins = False  # whether the next sign may belong to the last word
    alone = False  # whether the last word is one letter of a script without spaces
    for sign in text:
        if not in_word(sign):
            joins = False
            continue
        mark = unicodedata.category(sign)[0] == "M"
        if joins and (mark or not (alone or unspaced(sign))):
            found[-1] += sign
        else:
            found.append(sign)
            alone = unspaced(sign)
        joins = True
    return found


def units(text: str) -> list[str]:
    """What a text is made of between spaces, letters of scripts without spaces apart: the words by which repetition and
    length are counted. Of English text those of `split`."""
    if text.isascii():
        return text.split()
    return "".join(f" {sign} " if unspaced(sign) and in_word(sign) else sign for sign in text).split()


def normal(text: str) -> str:
    """A folded answer without the spaces that tokenizers put in or take out: around punctuation, and between letters of
    scripts that have none. Other spaces are one each."""
    folded = " ".join(fold(text).replace(" n't", "n't").split())
    if not folded:
        return ""
    kept = []
    for before, sign, after in zip(" " + folded[:-1], folded, folded[1:] + " ", strict=True):
        if sign != " " or (_spaced(before) and _spaced(after)):
            kept.append(sign)
    return "".join(kept)


def _spaced(sign: str) -> bool:
    return in_word(sign) and not unspaced(sign)


def bare(text: str) -> str:
    """A folded text without spaces and marks. That of the beginning of a text is the beginning of its own, and equal
    answers have equal ones."""
    return "".join(sign for sign in fold(text) if not sign.isspace() and not unicodedata.combining(sign))


class UnicodeTokenizer:
    """The words of any text for ROUGE, English ones stemmed as ROUGE stems them."""

    def tokenize(self, text: str) -> list[str]:
        """The words, as `rouge_score` calls for them."""
        return [_stem(word) if word.isascii() and len(word) > 3 else word for word in words(fold(text))]


@cache
def _official() -> DefaultTokenizer:
    return DefaultTokenizer(use_stemmer=True)


@lru_cache(maxsize=2**16)
def _stem(word: str) -> str:
    stemmed: list[str] = _official().tokenize(word)
    return stemmed[0] if stemmed else word


def seen_share(text: str) -> float:
    """Share of a text's words that the official ROUGE sees whole: those of a to z and 0 to 9."""
    found = words(fold(text))
    return sum(word.isascii() for word in found) / len(found) if found else 0.0
