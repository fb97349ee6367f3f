"""Recognise texts that repeat something of the forget set."""

from __future__ import annotations

from collections.abc import Sequence

from neko_lean.data import Example, fold, words

_SHARED_WORDS = 6  # in a row


class PrivateTexts:
    """What a self-generated row must not repeat of the forget set: any six words in a row, and any short answer.

    In scripts without spaces, each letter is a word. A short answer has two to five words, or one word of four or more
    characters with a digit, such as a phone number; any other single word, such as "yes", gives nothing away.

    Args:
        forget: the examples to forget.
    """

    def __init__(self, forget: Sequence[Example]) -> None:
        self._sequences = {sequence for example in forget for sequence in _sequences(_words(example.text))}
        answers = [_words(example.output) for example in forget]
        self._answers = {f" {' '.join(answer)} " for answer in answers if _is_telling(answer)}

    def occur_in(self, text: str) -> bool:
        """Whether a text repeats something of the forget set."""
        found = _words(text)
        if not self._sequences.isdisjoint(_sequences(found)):
            return True
        joined = f" {' '.join(found)} "
        return any(answer in joined for answer in self._answers)


def _words(text: str) -> list[str]:
    return words(fold(text))


def _sequences(found: Sequence[str]) -> set[tuple[str, ...]]:
    """Every sequence of _SHARED_WORDS words."""
    return {tuple(found[start : start + _SHARED_WORDS]) for start in range(len(found) - _SHARED_WORDS + 1)}


def _is_telling(answer: Sequence[str]) -> bool:
    if len(answer) == 1:
        return len(answer[0]) >= 4 and any(map(str.isdigit, answer[0]))
    return 2 <= len(answer) < _SHARED_WORDS
