"""Token ids outside the model's vocabulary: an error as soon as a text contains one.

A tokenizer may have more entries than the model, such as an image token in a text-only checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neko_lean.data import EncodedExample
from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import CausalLM


def refuse_unknown_ids(named_ids: Iterable[tuple[str, Sequence[int]]], lm: CausalLM) -> None:
    """Raise NekoLeanError naming the first text that contains a token id outside the model's vocabulary.

    Args:
        named_ids: name of each text for the message, such as 'row a-qa0' or 'document 3', and its token ids.
        lm: the model that will read the texts.
    """
    vocab_size = min(len(lm.head), len(lm.embedding))
    for name, ids in named_ids:
        largest = max(ids, default=0)
        if largest >= vocab_size:
            raise NekoLeanError(
                f"{name} holds token {largest}, but the model's vocabulary ends at {vocab_size - 1}; use the tokenizer "
                f"that belongs to the checkpoint, or resize the embedding before training."
            )


def refuse_unknown_examples(examples: Iterable[EncodedExample], lm: CausalLM) -> None:
    """`refuse_unknown_ids` for encoded examples, which are named by their id."""
    refuse_unknown_ids(((f"row {example.example.id}", example.input_ids) for example in examples), lm)
