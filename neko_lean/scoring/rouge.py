"""ROUGE-L of two lists of words, in memory linear in the number of words.

The results are those of the `rouge_score` package, whose table has a cell for each pair of words and needs hundreds of
gigabytes for an answer of one megabyte.
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


def longest_common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence.

    The words of the shorter list are the bits of an integer, and each word of the longer list updates all bits at once
    (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
    """
    short, long = sorted((first, second), key=len)
    bits: dict[str, int] = {}
    for place, word in enumerate(short):
        bits[word] = bits.get(word, 0) | 1 << place

    mask = (1 << len(short)) - 1
    unmatched = mask
    for word in long:
        matches = unmatched & bits.get(word, 0)
        if matches:
            unmatched = (unmatched + matches | unmatched - matches) & mask
    return len(short) - unmatched.bit_count()


def is_subsequence(part: Words, whole: Words) -> bool:
    """Whether the words of `part` occur in `whole` in the same order, with anything in between."""
    rest = iter(whole)
    return all(word in rest for word in part)
