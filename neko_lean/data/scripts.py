"""Text in any script: a normal form, and words, also in scripts that write no spaces between words.

The official ROUGE only knows the letters a to z and the digits 0 to 9, so two identical Russian texts score 0. The
functions here see all of Unicode; in plain English text they find exactly the words that ROUGE finds.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.tokenizers import DefaultTokenizer

# Scripts without spaces between words, in which each letter counts as a word: first and last code point of each block.
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x3005, 0x3007),  # Chinese iteration marks and zero
    (0x3040, 0x312F),  # Japanese kana, Bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),  # Chinese characters, as F900 and 20000 onwards
    (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9FF),  # Javanese, Burmese extensions
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def fold(text: str) -> str:
    """The form in which texts are compared.

    Compatibility decomposition (full-width and ligature forms become plain), case folding (ß becomes ss), decimal
    digits of every script as 0 to 9, the Turkish dotless i as i, and no invisible format characters.
    """
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return plain if plain.isascii() else "".join(map(_fold_character, plain)).replace("i\u0307", "i")


@lru_cache(maxsize=2**16)
def _fold_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Cf":
        return ""
    return "i" if character == "\u0131" else character


@lru_cache(maxsize=2**16)
def in_word(character: str) -> bool:
    """Whether a character is a letter, a digit, or a combining mark (such as Hindi vowels)."""
    return unicodedata.category(character)[0] in "LMN"


@lru_cache(maxsize=2**16)
def unspaced(character: str) -> bool:
    """Whether a character belongs to a script without spaces between words."""
    return any(first <= ord(character) <= last for first, last in UNSPACED)


def words(text: str) -> list[str]:
    """The words of a folded text: sequences of letters, digits and combining marks.

    In a script without spaces, each letter with its marks is a word.
    """
    if text.isascii():
        return re.findall(r"[a-z0-9]+", text)
    result: list[str] = []
    continues = False  # whether the next character may extend the last word
    is_single = False  # whether the last word is a letter of a script without spaces
    for character in text:
        if not in_word(character):
            continues = False
            continue
        is_mark = unicodedata.category(character)[0] == "M"
        if continues and (is_mark or not (is_single or unspaced(character))):
            result[-1] += character
        else:
            result.append(character)
            is_single = unspaced(character)
        continues = True
    return result


def units(text: str) -> list[str]:
    """The units in which length and repetition are counted: words with their punctuation, as `str.split` returns them.

    Letters of scripts without spaces are units by themselves.
    """
    if text.isascii():
        return text.split()
    spaced = (f" {character} " if unspaced(character) and in_word(character) else character for character in text)
    return "".join(spaced).split()


def normal(text: str) -> str:
    """A folded answer without the spaces that tokenizers add or remove.

    Those are the spaces around punctuation, and between letters of scripts that write none. Other whitespace becomes a
    single space.
    """
    folded = " ".join(fold(text).replace(" n't", "n't").split())
    if not folded:
        return ""
    characters = []
    for before, character, after in zip(" " + folded[:-1], folded, folded[1:] + " ", strict=True):
        if character != " " or (_is_spaced(before) and _is_spaced(after)):
            characters.append(character)
    return "".join(characters)


def _is_spaced(character: str) -> bool:
    return in_word(character) and not unspaced(character)


def bare(text: str) -> str:
    """A folded text without spaces and combining marks.

    The bare form of a prefix is a prefix of the bare form, and equal answers have equal bare forms.
    """
    return "".join(
        character for character in fold(text) if not character.isspace() and not unicodedata.combining(character)
    )


class UnicodeTokenizer:
    """Tokenizer for ROUGE that finds words in any script, and stems English words as ROUGE does."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in the interface of `rouge_score`."""
        return [_stem(word) if word.isascii() and len(word) > 3 else word for word in words(fold(text))]


@cache
def official_tokenizer() -> DefaultTokenizer:
    """The tokenizer of the official ROUGE."""
    from rouge_score.tokenizers import DefaultTokenizer  # imports all of nltk

    return DefaultTokenizer(use_stemmer=True)


@lru_cache(maxsize=2**16)
def _stem(word: str) -> str:
    stemmed: list[str] = official_tokenizer().tokenize(word)
    return stemmed[0] if stemmed else word


def visible_share(text: str) -> float:
    """Share of a text's words that the official ROUGE sees in full: those of a to z and 0 to 9."""
    all_words = words(fold(text))
    return sum(word.isascii() for word in all_words) / len(all_words) if all_words else 0.0
