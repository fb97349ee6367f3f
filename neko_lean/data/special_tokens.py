"""Find the special tokens that a tokenizer adds around a text, and remove those after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Affixes = tuple[tuple[int, ...], tuple[int, ...]]  # the token ids before and after a text

# Short texts that end differently in almost every vocabulary.
PROBES = ("a", "The sky is blue.", "7", "x y", "\u0436", "\u4e2d", "\n")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of a tokenizer's special tokens by their texts, longest first."""
    tokens = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for name in tokenizer.all_special_tokens:
        tokens.setdefault(name, cast(int, tokenizer.convert_tokens_to_ids(name)))
    return dict(sorted(tokens.items(), key=lambda item: -len(item[0])))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and after every text.

    They are determined by tokenizing a few short texts with and without special tokens, because post-processors come in
    many forms (templates, properties, code).

    Returns:
        The token ids before a text, and those after it.

    Raises:
        NekoLeanError: If the tokenizer adds different tokens after different texts, or tokenizes texts differently
            without special tokens.
    """
    affixes = _affixes_of(tokenizer, PROBES)
    if not affixes:  # the vocabulary covers none of the probes: take texts from the vocabulary itself
        special = set(tokenizer.all_special_ids)
        known_ids = [i for i in range(len(tokenizer)) if i not in special][:64:4]
        affixes = _affixes_of(tokenizer, [cast(str, tokenizer.decode([i])) for i in known_ids])

    suffixes = sorted({suffix for _, suffix in affixes})
    if len(suffixes) > 1:
        raise NekoLeanError(
            f"the tokenizer ends some texts with the token ids {list(suffixes[0])} and others with "
            f"{list(suffixes[1])}, so these cannot be told from a prompt's own tokens; use a tokenizer that appends "
            f"no special tokens."
        )
    if not affixes:
        raise NekoLeanError(
            "the tokenizer splits texts differently with and without special tokens, so these cannot be told from a "
            "prompt's own tokens; use a tokenizer that appends no special tokens."
        )
    prefix, suffix = min(affixes)
    return list(prefix), list(suffix)


def ids_without_special_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without added special tokens."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def remove_suffix(ids: list[int], content: list[int], prefix: list[int], suffix: list[int]) -> list[int]:
    """Remove the special tokens that the tokenizer added after a text.

    Args:
        ids: The text's token ids with added special tokens.
        content: The text's token ids without them.
        prefix: The tokens that the tokenizer adds before a text.
        suffix: The tokens that the tokenizer adds after a text.
    """
    for start in (prefix, []):  # some tokenizers omit the prefix if the text already begins with it
        if ids == [*start, *content, *suffix]:
            return [*start, *content]
        if ids == [*start, *content]:  # some, such as ByT5, omit the suffix if the text already ends with it
            return ids
    return ids[: -len(suffix)] if ids[-len(suffix) :] == suffix else ids


def _affixes_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> set[Affixes]:
    """The tokens that are added around `texts`, from those texts for which they are unambiguous."""
    if not texts:
        return set()

    full: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    bare = ids_without_special_tokens(tokenizer, texts)
    if full == bare:
        return {((), ())}

    affixes = set()
    for ids, content in zip(full, bare, strict=True):
        last_start = len(ids) - len(content)
        starts = [i for i in range(last_start + 1) if content and ids[i : i + len(content)] == content]
        if len(starts) == 1:  # with several, the text's own tokens look like the added ones
            affixes.add((tuple(ids[: starts[0]]), tuple(ids[starts[0] + len(content) :])))
    return affixes
