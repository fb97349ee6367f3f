"""Split documents into passages, so that a model can be asked to continue each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from neko_lean.data import Example
from neko_lean.errors import NekoLeanError

PASSAGE_CHARACTERS = 1200  # at most, of which the first half is the prompt: about 150 tokens of English each
_GAP = re.compile(r"(\s{8})\s+")
_NEAR = 40  # characters from the exact division at which a word start is looked for


def split_documents(examples: Sequence[Example]) -> list[Example]:
    """Replace each document by its passages: the first half of a passage is the prompt, and the second the answer.

    Together the passages contain all of the document. The first one keeps its id, and the others have it with the
    number of their first character. All of them remain one document for the intervals. Other examples stay as they are.

    Raises:
        NekoLeanError: if a document is a single word, so that nothing is left to continue.
    """
    results: list[Example] = []
    for example in examples:
        if example.kind != "document" or example.input:
            results.append(example)
            continue
        text = example.output.strip()
        if len(text) < 2 or (text.isascii() and len(text.split()) < 2):
            raise NekoLeanError(
                f"row {example.id}: a document of a single word leaves nothing to continue; remove it or add its text."
            )
        results += _passages(example)
    return results


def _passages(document: Example) -> Iterator[Example]:
    # A long gap, as in text from a PDF file, would make an empty passage.
    text = _GAP.sub(r"\1", document.output.strip())
    # Passages of equal length, rather than a last one of a few words.
    count = -(-len(text) // PASSAGE_CHARACTERS)
    edges = [0, *(_word_start(text, len(text) * part // count) for part in range(1, count)), len(text)]
    for start, end in pairwise(edges):
        passage = text[start:end].rstrip()
        middle = _word_start(passage, len(passage) // 2)
        row_id = f"{document.id} @{start}" if start else document.id
        yield replace(document, id=row_id, input=passage[:middle].rstrip(), output=passage[middle:])


def _word_start(text: str, position: int) -> int:
    """The word start that is nearest to `position`, or `position` if none is near, as in Chinese."""
    near = range(max(1, position - _NEAR), min(len(text), position + _NEAR + 1))
    starts = [place for place in near if text[place - 1].isspace() and not text[place].isspace()]
    return min(starts, key=lambda place: abs(place - position), default=position)
