"""Tokenize examples: prompt tokens, then answer tokens, truncated to a maximum length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from neko_lean.data.examples import EncodedExample, Example
from neko_lean.data.prompts import PromptFormat, find_format
from neko_lean.data.special_tokens import added_tokens, ids_without_special_tokens, remove_suffix
from neko_lean.errors import NekoLeanError
from neko_lean.terminal import log_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptFormat | str,
    max_length: int,
    *,
    append_eos: bool = False,
    windows: bool = False,
) -> list[EncodedExample]:
    """Tokenize examples.

    The prompt's tokens are those of the prompt alone, as generation receives them. The answer's tokens are therefore
    exactly those that a generation has to produce.

    Args:
        examples: The examples to tokenize.
        tokenizer: The model's tokenizer.
        prompts: The prompt format, or the name of one, as for `find_format`.
        max_length: The maximum number of tokens of an example; the rest is truncated.
        append_eos: End every answer with the EOS token, unless a chat template has ended it.
        windows: Split documents that are longer than `max_length` into windows instead of truncating them. Each window
            repeats the last `max_length // 8` tokens of the one before.

    Returns:
        The tokenized examples, in the same order.

    Raises:
        NekoLeanError: If the prompt format is unknown, if `append_eos` is set and the tokenizer has no EOS token, or
            if the tokenizer's special tokens cannot be determined.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> [encoded] = encode([Example("7qa0", "Hi?", "Yo", "Task1")], ByT5Tokenizer(), "plain", max_length=512)
        >>> encoded.input_ids
        [75, 108, 66, 35, 92, 114]
        >>> encoded.prompt_length, encoded.answer_length
        (3, 3)
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise NekoLeanError("the tokenizer has no EOS token to append; add one to it or set append_eos=false.")

    prompts = find_format(prompts, tokenizer) if isinstance(prompts, str) else prompts
    rendered = [prompts.render(example) for example in examples]
    special = set(tokenizer.all_special_ids)
    prompt_ids = _encode_rendered(tokenizer, [(text.prompt, text.has_special_tokens) for text in rendered])
    whole_ids = _encode_rendered(tokenizer, [(text.prompt + text.answer, text.has_special_tokens) for text in rendered])

    encoded = []
    for example, text, prompt, ids in zip(examples, rendered, prompt_ids, whole_ids, strict=True):
        # If a token spans the end of the prompt, tokenize prompt and answer separately.
        if ids[: len(prompt)] != prompt:
            ids = prompt + continuation_ids(tokenizer, text.answer)
        if append_eos and not text.has_special_tokens:
            ids = [*ids, tokenizer.eos_token_id]

        if windows and example.kind == "document" and len(ids) > max_length:
            encoded += _windows(example, ids, len(prompt), max_length)
        else:
            input_ids = ids[:max_length]
            prompt_length = min(len(prompt), len(input_ids))
            end_length = 0
            while len(input_ids) - end_length > prompt_length and input_ids[-1 - end_length] in special:
                end_length += 1
            num_truncated = len(ids) - len(input_ids)
            encoded.append(EncodedExample(example, input_ids, prompt_length, num_truncated, end_length=end_length))
    return encoded


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompts: PromptFormat | str
) -> list[list[int]]:
    """The token ids of each example's prompt, as in `encode`."""
    prompts = find_format(prompts, tokenizer) if isinstance(prompts, str) else prompts
    rendered = [prompts.render(example) for example in examples]
    return _encode_rendered(tokenizer, [(text.prompt, text.has_special_tokens) for text in rendered])


def _windows(example: Example, ids: list[int], prompt_length: int, max_length: int) -> list[EncodedExample]:
    """Split a long example so that every token after the first window's is predicted in exactly one more window.

    The first window has the example's own id. The others have it with the number of their first token.
    """
    overlap = max_length // 8
    results: list[EncodedExample] = []
    start = 0
    while not results or start + overlap < len(ids):
        window = ids[start : start + max_length]
        context = overlap if start else 0
        results.append(
            EncodedExample(
                example=replace(example, id=f"{example.id} @{start}") if start else example,
                input_ids=window,
                prompt_length=min(len(window), max(prompt_length - start, context)),
                num_truncated=0,
                num_context=context,
                num_following=max(0, len(ids) - start - max_length),
            )
        )
        start += max_length - overlap
    return results


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
    """The token ids of texts, each with whether it spells out its special tokens."""
    complete = [text for text, has_special_tokens in texts if has_special_tokens]
    other = iter(encode_texts(tokenizer, [text for text, has_special_tokens in texts if not has_special_tokens]))
    rendered = iter(ids_without_special_tokens(tokenizer, complete) if complete else [])
    return [next(rendered if has_special_tokens else other) for _, has_special_tokens in texts]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text that the model continues: with the tokenizer's prefix (BOS), but without its suffix.

    Some tokenizers end every text with special tokens (`add_eos_token`, a `[SEP]` or another template). A prompt must
    not end with them, and an answer ends with EOS only through `encode(append_eos=True)`. Special tokens that the text
    itself spells out are kept. If the tokenizer adds no suffix, the result is that of `tokenizer(text)`.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`encode_text` for many texts, in one call to the tokenizer."""
    if not texts:
        return []

    # verbose=False: no warning about texts longer than the tokenizer's limit, since callers truncate them.
    full: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    prefix, suffix = added_tokens(tokenizer)
    if prefix and prefix[-1] == tokenizer.bos_token_id:  # a text that already begins with BOS must not get two
        full = [ids[1:] if ids[: len(prefix) + 1] == [*prefix, prefix[-1]] else ids for ids in full]
    if not suffix:
        return full

    bare = ids_without_special_tokens(tokenizer, texts)
    return [remove_suffix(ids, content, prefix, suffix) for ids, content in zip(full, bare, strict=True)]


def truncation_summary(encoded: Sequence[EncodedExample], max_length: int) -> str:
    """How many examples were truncated to `max_length` tokens, for the log; '' if all are whole."""
    if not any(example.num_truncated or example.num_context or example.num_following for example in encoded):
        return ""
    count = sum(example.num_truncated > 0 for example in encoded)
    tokens = sum(example.num_truncated for example in encoded)
    summary = f"{count} of {len(encoded)} rows truncated to {max_length} tokens ({tokens} tokens lost)"
    windows = sum(example.num_context > 0 or example.num_following > 0 for example in encoded)
    if windows:
        documents = sum(example.num_context == 0 and example.num_following > 0 for example in encoded)
        summary += f"; {documents} long documents split into {windows} windows that overlap by {max_length // 8} tokens"
    return summary


def position_warning(encoded: Sequence[EncodedExample], limit: int, max_length: int) -> str | None:
    """The warning that examples are truncated because the model has too few positions.

    Args:
        encoded: Examples that were truncated to `limit` tokens.
        limit: The number of positions that the model supports.
        max_length: The length that the user asked for, in tokens.

    Returns:
        The warning, or None if nothing was truncated for this reason.
    """
    if limit >= max_length or not any(example.num_truncated for example in encoded):
        return None
    summary = truncation_summary(encoded, limit)
    return f"warning: {summary}: the model has only {limit} positions, fewer than the requested {max_length}"


def log_truncation(encoded: Sequence[EncodedExample], limit: int, max_length: int, quiet: bool) -> None:
    """Log `truncation_summary` unless `quiet`, and `position_warning` in any case. The arguments are theirs."""
    if summary := truncation_summary(encoded, limit):
        log_line(summary, quiet)
    if warning := position_warning(encoded, limit, max_length):
        log_line(warning)


def continuation_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The token ids of a text that continues another one, such as an answer.

    SentencePiece tokenizers put a space before a text that stands alone, so tokenize it after another text.
    """
    lead, lead_and_answer, alone = ids_without_special_tokens(tokenizer, ["a", "a" + answer, answer])
    return lead_and_answer[len(lead) :] if lead_and_answer[: len(lead)] == lead else alone
