"""Whether a text is degenerate: empty, unreadable, a loop, or fragments strung together.

The judgement uses the text alone. The loss under the scored model proves nothing, because a collapsed model finds its
own loops likely, and a score does not have the checkpoint of the model before. A text of different rare words in a
meaningless order is therefore not detected. Pure functions on texts in any script.
"""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections.abc import Sequence
from itertools import groupby, pairwise

from neko_lean.data.scripts import fold, in_word, unspaced, words

# The thresholds were chosen on half of tests/scoring/labelled_outputs.jsonl.
# Unreadable: at least this share of the characters are control characters, or bytes that are no text.
MAX_UNREADABLE = 0.1
# Runs: this many equal marks or empty lines in a row, or this share of the tokens, but one, repeat the one before.
MAX_RUN, MAX_RUNS = 4, 0.2
# Fragments: at least this share of the words begin directly after the end of another (`number?'s`, `isWhat`).
MAX_JOINED = 0.05
# A loop of phrases: a stretch of this many characters compresses to less than 1 / MAX_COMPRESSION of its length ...
STRETCH, MAX_COMPRESSION = 200, 1.85
# ... or fewer than this share of the pairs of words are distinct (distinct-2).
MIN_DISTINCT_PAIRS = 0.65
# A loop of few words: fewer than this share of any WINDOW consecutive words are distinct (distinct-1).
WINDOW, MIN_DISTINCT = 16, 0.5
# Stuttering: at least this share of the words, not counting two, occurred among the two words before.
MAX_STUTTER = 0.07
# A list of frequent words: the words have fewer letters than this on average.
MIN_LETTERS = 2.5
# Fewer words say too little about distinctness or length.
MIN_WORDS, MIN_WORDS_FOR_LETTERS = 6, 8
LEADERS = frozenset(".-=_*#~|)]}")  # marks that are repeated on purpose, as in rules, tables of contents and code
ZLIB_OVERHEAD = 8  # bytes


def is_degenerate(text: str) -> bool:
    """Whether a reader would call the text broken, judged by its characters and words."""
    text = text.rstrip("\ufffd")  # an incomplete character where the text was truncated
    tokens = tokenize(text)
    all_words = [token for token in tokens if in_word(token[0])]
    if not all_words or unreadable_share(text) >= MAX_UNREADABLE:
        return True
    return (
        has_long_run(tokens)
        or run_share(tokens) >= MAX_RUNS
        or joined_share(text, len(all_words)) >= MAX_JOINED
        or compression(tokens) >= MAX_COMPRESSION
        or has_few_words(all_words)
    )


def has_few_words(all_words: Sequence[str]) -> bool:
    """Whether the same few words occur again and again, or only short ones, as frequent words are."""
    if len(all_words) < MIN_WORDS:
        return False
    return (
        distinct_share(all_words) < MIN_DISTINCT
        or distinct_pairs(all_words) < MIN_DISTINCT_PAIRS
        or stutter_share(all_words) >= MAX_STUTTER
        or mean_letters(all_words) < MIN_LETTERS
    )


def tokenize(text: str) -> list[str]:
    """The folded words of a text, as `scripts.words`, and between them each punctuation mark and empty line."""
    tokens: list[str] = []
    word = ""
    lines = 0  # consecutive line breaks
    for character in fold(text) + " ":
        if in_word(character):
            word += character
            lines = 0
            continue
        tokens += words(word)
        word = ""
        lines = lines + 1 if character == "\n" else lines
        if character == "\n" and lines > 1:
            tokens.append(character)
        elif not character.isspace():
            tokens.append(character)
            lines = 0
    return tokens


def unreadable_share(text: str) -> float:
    """Share of the characters that are control characters or replace bytes that are no text."""
    unreadable = sum(
        character == "\ufffd" or (unicodedata.category(character) in ("Cc", "Co") and not character.isspace())
        for character in text
    )
    return unreadable / max(1, len(text))


def has_long_run(tokens: Sequence[str]) -> bool:
    """Whether the same mark or empty line occurs MAX_RUN times in a row; `!` and `?` are emphasis."""
    marks = (token for token in tokens if token not in "!?" and token not in LEADERS)
    return any(not in_word(mark[0]) and len(list(run)) >= MAX_RUN for mark, run in groupby(marks))


def run_share(tokens: Sequence[str]) -> float:
    """Share of the tokens that repeat the one before, not counting one ("Baden Baden") and marks in LEADERS."""
    repeats = sum(token == before and token not in LEADERS for before, token in pairwise(tokens))
    return max(0, repeats - 1) / max(1, sum(token not in LEADERS for token in tokens) - 1)


def joined_share(text: str, num_words: int) -> float:
    """Number of words that begin directly after a mark or in another word, without one of the latter, per word."""
    after_mark = in_other = 0
    for before, character, after in zip(text, text[1:], text[2:] + " ", strict=False):
        if before in "?!;,":
            starts = character.isalpha() and not unspaced(character)
            after_mark += starts or (character in "'’" and after.isalpha())  # noqa: RUF001 (a quotation mark)
        elif before.islower() and character.isupper():
            in_other += after.islower()
    return (after_mark + max(0, in_other - 1)) / max(1, num_words)


def compression(tokens: Sequence[str]) -> float:
    """Compression ratio of the most repetitive stretch of a text, without marks that are repeated on purpose.

    Each distinct character is one byte, so that the ratio does not depend on the script.
    """
    text = " ".join(token for token in tokens if token not in LEADERS)
    symbols: dict[str, int] = {}
    coded = bytes(symbols.setdefault(character, len(symbols)) % 256 for character in text)
    stretches = [coded[start : start + STRETCH] for start in range(0, max(1, len(coded) - STRETCH // 2), STRETCH // 2)]
    return max(len(part) / max(1, len(zlib.compress(part, 9)) - ZLIB_OVERHEAD) for part in stretches)


def distinct_share(all_words: Sequence[str]) -> float:
    """The smallest share of distinct words (distinct-1) within WINDOW consecutive words, or within all if fewer."""
    size = min(WINDOW, len(all_words))
    windows = (all_words[start : start + size] for start in range(len(all_words) - size + 1))
    return min(len(set(window)) / size for window in windows)


def distinct_pairs(all_words: Sequence[str]) -> float:
    """Share of distinct pairs among all pairs of consecutive words (distinct-2)."""
    pairs = list(pairwise(all_words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def stutter_share(all_words: Sequence[str]) -> float:
    """Share of the words that occurred among the two words before; two such words are emphasis."""
    repeats = sum(word in all_words[max(0, place - 2) : place] for place, word in enumerate(all_words))
    return max(0, repeats - 2) / max(1, len(all_words))


def mean_letters(all_words: Sequence[str]) -> float:
    """Mean length of the words in letters and marks; infinite if too few are of scripts with spaces."""
    spaced = [word for word in all_words if not word[0].isdigit() and not unspaced(word[0])]
    return sum(map(len, spaced)) / len(spaced) if len(spaced) >= MIN_WORDS_FOR_LETTERS else math.inf
