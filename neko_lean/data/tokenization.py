"""Tokenize examples: prompt tokens, answer tokens, truncation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from neko_lean.data.examples import EncodedExample, Example
from neko_lean.data.prompts import prompt_and_answer


def encode(
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    style: str,
    max_length: int,
    *,
    append_eos: bool = False,
) -> list[EncodedExample]:
    """Tokenise rows in `style`, cut to `max_length` tokens; with `append_eos` the answer ends in the EOS token.

    The prompt's tokens are those of the prompt alone, as the scorer will feed it, so answer positions are the ones
    that a generation has to produce. Raises NekoLeanError for `append_eos` with a tokenizer that has no EOS token.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise NekoLeanError(
            "this tokenizer has no EOS token, so answers cannot end in one: give it one, or set append_eos=false."
        )
    texts = [prompt_and_answer(row, style) for row in rows]
    prompts = encode_texts(tokenizer, [prompt for prompt, _ in texts])
    wholes = encode_texts(tokenizer, [prompt + answer for prompt, answer in texts])
    encoded = []
    for row, (_, answer), prompt_ids, whole_ids in zip(rows, texts, prompts, wholes, strict=True):
        ids = whole_ids
        if ids[: len(prompt_ids)] != prompt_ids:  # a merge across the border: keep the prompt as the scorer sees it
            ids = prompt_ids + _continuation(tokenizer, answer)
        if append_eos:
            ids = [*ids, tokenizer.eos_token_id]
        kept = ids[:max_length]
        encoded.append(EncodedExample(row, kept, min(len(prompt_ids), len(kept)), len(ids) - len(kept)))
    return encoded


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text that is to be continued: with the tokenizer's own prefix (BOS), without its suffix.

    Tokenizers with `add_eos_token`, a `[SEP]` or another template end every text in special tokens. A prompt must not
    end in them, and an answer gets its end only from `encode(append_eos=True)`. For a tokenizer that adds no suffix
    these are exactly the ids of `tokenizer(text)`. Special tokens that the text itself spells out stay.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`encode_text` of many texts: the tokenizer is called for all of them at once."""
    if not texts:
        return []

    # verbose=False: that a text is longer than the tokenizer's limit is not said here, since callers cut.
    full: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    prefix, suffix = added_tokens(tokenizer)
    if not suffix:
        return full

    bare = _without_special(tokenizer, texts)
    return [_without_suffix(*pair, prefix, suffix) for pair in zip(full, bare, strict=True)]


# Texts that end differently in nearly every vocabulary.
PROBES = ("a", "The sky is blue.", "7", "x y", "\u0436", "\u4e2d", "\n")


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after every text.

    They are what it adds to a few short texts, since post-processors come in many forms (templates, properties, code).
    Raises NekoLeanError for a tokenizer that adds different suffixes to different texts.
    """
    found = _added_to(tokenizer, PROBES)
    if not found:  # a vocabulary without any of these: take texts from it
        special = set(tokenizer.all_special_ids)
        known = [i for i in range(len(tokenizer)) if i not in special][:64:4]
        found = _added_to(tokenizer, [cast(str, tokenizer.decode([i])) for i in known])

    suffixes = sorted({suffix for _, suffix in found})
    if len(suffixes) > 1:
        raise NekoLeanError(
            f"this tokenizer ends some texts in the token ids {list(suffixes[0])} and others in {list(suffixes[1])}, "
            f"so a prompt's own tokens cannot be told from those that it appends: use a tokenizer that appends nothing."
        )
    if not found:
        raise NekoLeanError(
            "this tokenizer splits texts differently with its special tokens than without them, so what it appends to "
            "a prompt cannot be told from the prompt's own tokens: use a tokenizer that appends nothing."
        )
    prefix, suffix = min(found)
    return list(prefix), list(suffix)


def _added_to(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What is added before and after each of `texts`, where that is not ambiguous."""
    if not texts:
        return set()
    full: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    bare = _without_special(tokenizer, texts)
    if full == bare:
        return {((), ())}

    found = set()
    for ids, content in zip(full, bare, strict=True):
        last = len(ids) - len(content)
        places = [i for i in range(last + 1) if content and ids[i : i + len(content)] == content]
        if len(places) == 1:  # otherwise the text's own tokens look like those that are added
            found.add((tuple(ids[: places[0]]), tuple(ids[places[0] + len(content) :])))
    return found


def _without_suffix(full: list[int], content: list[int], prefix: list[int], suffix: list[int]) -> list[int]:
    """`full` less the suffix that was added to it; `content` are the ids without any added token."""
    for start in (prefix, []):  # some tokenizers leave out a prefix that the text itself begins with
        if full == [*start, *content, *suffix]:
            return [*start, *content]
        if full == [*start, *content]:  # and some a suffix that it ends in, as ByT5 does
            return full
    return full[: -len(suffix)] if full[-len(suffix) :] == suffix else full


def _without_special(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _continuation(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The ids of an answer inside a text: before a text on its own, SentencePiece would put a space."""
    lead, whole, alone = _without_special(tokenizer, ["a", "a" + answer, answer])
    return whole[len(lead) :] if whole[: len(lead)] == lead else alone


def truncation_line(encoded: Sequence[EncodedExample], max_length: int) -> str:
    """How many rows the length limit cut, in words."""
    cut = sum(e.num_truncated > 0 for e in encoded)
    return (
        f"{cut} of {len(encoded)} rows cut to {max_length} tokens ({sum(e.num_truncated for e in encoded)} tokens lost)"
    )


def position_warning(encoded: Sequence[EncodedExample], limit: int, max_length: int) -> str | None:
    """That rows are cut because the model embeds no more than `limit` positions, or None where none is.

    `encoded` were cut to `limit`; `max_length` is the length that was asked for.
    """
    if limit >= max_length or not any(one.num_truncated for one in encoded):
        return None
    return f"warning: the model has {limit} positions, fewer than the {max_length} asked for: " + truncation_line(
        encoded, limit
    )
