"""ROUGE-L of two lists of words, in the memory that the words take.

The numbers are those of the `rouge_score` package, whose table has a cell for each pair of words: for an answer of a
megabyte that is hundreds of gigabytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.scoring import Score, fmeasure

Words = Sequence[str]


def rouge_l(target: Words, prediction: Words) -> Score:
    """ROUGE-L, 0 to 1: precision, recall and fmeasure."""
    if not target or not prediction:
        return Score(precision=0, recall=0, fmeasure=0)
    common = longest_common(target, prediction)
    precision, recall = common / len(prediction), common / len(target)
    return Score(precision=precision, recall=recall, fmeasure=fmeasure(precision, recall))


def longest_common(one: Words, two: Words) -> int:
    """Length of the longest common subsequence.

    The shorter list's words are bits of an integer, and each word of the longer list updates all of them at once
    (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
    """
    short, long = sorted((one, two), key=len)
    places: dict[str, int] = {}
    for place, word in enumerate(short):
        places[word] = places.get(word, 0) | 1 << place

    whole = (1 << len(short)) - 1
    unmatched = whole
    for word in long:
        found = unmatched & places.get(word, 0)
        if found:
            unmatched = (unmatched + found | unmatched - found) & whole
    return len(short) - unmatched.bit_count()


def is_subsequence(part: Words, whole: Words) -> bool:
    """Whether the words of `part` occur in `whole` in their order, with anything in between."""
    rest = iter(whole)
    return all(word in rest for word in part)
