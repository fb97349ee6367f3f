"""Token ids beyond the model's vocabulary: harmless until a text contains one, then an error.

A tokenizer may have more entries than the model, such as an image token of a text-only checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neko_lean.data import EncodedExample
from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import CausalLM


def refuse_unknown_ids(named: Iterable[tuple[str, Sequence[int]]], lm: CausalLM) -> None:
    """Raise NekoLeanError naming the first text with a token that the model has no row for.

    Args:
        named: what to call each text, such as 'row a-qa0' or 'document 3', and its token ids.
        lm: the model that the texts are meant for.
    """
    vocab_size = min(len(lm.head), len(lm.embedding))
    for name, ids in named:
        most = max(ids, default=0)
        if most >= vocab_size:
            raise NekoLeanError(
                f"{name} holds token {most}, but the model has rows for 0 to {vocab_size - 1} only: give the tokenizer "
                f"that belongs to the checkpoint, or resize the embedding before training."
            )


def refuse_unknown_rows(rows: Iterable[EncodedExample], lm: CausalLM) -> None:
    """`refuse_unknown_ids` for encoded rows, which are named by their id."""
    refuse_unknown_ids(((f"row {one.example.id}", one.input_ids) for one in rows), lm)
