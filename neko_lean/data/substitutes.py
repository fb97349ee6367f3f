"""Substitute answers to train on instead of the forget set's: a refusal, or the answer to a different prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from neko_lean.data.examples import EncodedExample, Example
from neko_lean.data.similarity import PromptIndex
from neko_lean.errors import NekoLeanError

# Modeled on the refusals of TOFU (arXiv 2401.06121, appendix).
REFUSALS = (
    "I don't know.",
    "I'm not sure.",
    "I have no information on that.",
    "That's beyond what I know.",
    "I can't say.",
    "I am unable to answer that.",
    "I haven't learned about that.",
    "I cannot help with that.",
)


def refusals(forget: Sequence[Example]) -> list[Example]:
    """Each forget example with a refusal as its answer.

    The example's text determines which refusal it gets, so that a run and its cache agree.
    """
    return [
        replace(
            example,
            id=f"refusal {example.id}",
            output=REFUSALS[int(example.digest, 16) % len(REFUSALS)],
        )
        for example in forget
    ]


def random_answers(forget: Sequence[Example], retain: Sequence[Example], seed: int) -> list[Example]:
    """Each forget example with the answer of a random retain example of the same kind.

    This is the mismatch term of arXiv 2310.10683, eq. 3. If no retain example is of that kind, all of them are used.
    """
    rng = random.Random(f"{seed} random answers")
    answers = {
        kind: [example.output for example in retain if example.kind == kind]
        for kind in ("completion", "qa", "document")
    }
    all_answers = [example.output for example in retain]
    return [
        replace(
            example,
            id=f"random {example.id}",
            output=rng.choice(answers[example.kind] or all_answers),
        )
        for example in forget
    ]


def similar_answers(forget: Sequence[EncodedExample], retain: Sequence[EncodedExample]) -> list[Example]:
    """Each forget example with the answer of the retain example whose prompt is most like its own.

    The answer has the form of the forgotten one, as that of a model that knows the retain set alone would have. See
    `PromptIndex.nearest`.

    Raises NekoLeanError if no retain example has a prompt.
    """
    prompted = [encoded for encoded in retain if encoded.example.kind != "document"]
    if not prompted:
        raise NekoLeanError(
            "substitute 'similar' answers forget prompts as similar retain prompts, but the retain set has documents "
            "only; use rows with prompts, or another recipe, such as calibrated."
        )
    index = PromptIndex(prompted)
    results = []
    for encoded in forget:
        [number] = index.nearest(encoded, 1)
        answer = prompted[number].example.output
        results.append(replace(encoded.example, id=f"similar {encoded.example.id}", output=answer))
    return results
