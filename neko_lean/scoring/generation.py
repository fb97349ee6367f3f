"""Greedy decoding in batches, whatever generation config came with the checkpoint.

A row stops early once nothing that it could still say would change any of its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from neko_lean.data import Example, encode_texts
from neko_lean.distributed import items_of_rank
from neko_lean.errors import NekoLeanError
from neko_lean.models import CausalLM, eos_token_ids, greedy_tokens, refuse_unknown_ids, unknown_eos_token_ids
from neko_lean.scoring.decoding import Prompts
from neko_lean.scoring.decoding_probe import PADDED, decode_exactly, pick_method
from neko_lean.scoring.limits import MAX_LENGTH, Cut, fitted, generation_batches
from neko_lean.scoring.scripts import bare
from neko_lean.scoring.task import regurgitation, same_answers, unicode_regurgitation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Leaks and brokenness are judged by a generation's first tokens: so many, or twice the answer's where that is more.
WINDOW = 64


STRIDE = 16  # tokens between two looks at whether a row is settled


@dataclass(frozen=True)
class Decoding:
    """How rows are generated: so many together at most, and so many new tokens each."""

    batch_size: int
    max_new_tokens: int


@dataclass(frozen=True)
class Generation:
    """What a model said to a prompt. `window` is the text of its first tokens; `ended` is 'eos', 'limit', or 'settled'
    for one that was stopped since its numbers could change no more."""

    text: str
    window: str
    ended: str


def settled(row: Example, text: str) -> bool:
    """Whether the row's scores, the official one and that of any script, are the same however `text` goes on.

    Cleaning up spaces later can move words together, so that only what it cannot touch counts: all but the spaces of
    an answer to a question, and of a text all but its last two words.
    """
    if row.kind == "qa":
        # An answer like None is read back as nan, so that a NULL would still be right.
        return not any(bare(one).startswith(bare(text.rstrip("\ufffd"))) for one in same_answers(row.output))
    whole = " ".join(text.split()[:-2])
    return regurgitation(row.output, whole) == 1.0 == unicode_regurgitation(row.output, whole)


def spoken(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], window: int, ended: str) -> Generation:
    """A Generation from its tokens: special ones dropped, spaces cleaned up."""

    def text(some: Sequence[int]) -> str:
        # Called outright: the option of decode, which the task set, is ignored for BPE by transformers 5.
        return tokenizer.clean_up_tokenization(cast(str, tokenizer.decode(list(some), skip_special_tokens=True)))

    return Generation(text(ids), text(ids[:window]), ended)


def own_rows(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    decoding: Decoding,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """Numbers of the rows that this rank is to generate: all of its share of the batches, so that `generate` of these
    rows makes the very batches that one process makes of all, and their texts are the same in any dtype."""
    encoded = _prompts(tokenizer, rows) if prompts is None else prompts
    fits = [fitted(lm, ids, decoding.max_new_tokens) for ids in encoded]
    batches = _batches(rows, encoded, fits, decoding.batch_size)
    return sorted(i for batch in items_of_rank(batches) for i in batch)


def _prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> list[list[int]]:
    return encode_texts(tokenizer, [row.input for row in rows])


def _batches(
    rows: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    fits: Sequence[tuple[Sequence[int], int]],
    batch_size: int,
) -> list[list[int]]:
    """Numbers of the rows, questions with questions and prompts with those of like length: full batches, and for each
    kind of row one at its end that may not be."""
    lengths, shapes = [len(ids) for ids in prompts], [(len(kept), room) for kept, room in fits]
    kinds = ([i for i, row in enumerate(rows) if row.kind == kind] for kind in ("qa", "sc"))
    return [batch for own in kinds for batch in generation_batches(lengths, shapes, own, batch_size)]


def refuse_empty_prompts(rows: Sequence[Example], encoded: Sequence[Sequence[int]]) -> None:
    """Raise NekoLeanError naming the first row whose prompt has no tokens: there is nothing to continue."""
    empty = next((row for row, ids in zip(rows, encoded, strict=True) if not ids), None)
    if empty is not None:
        raise NekoLeanError(f"row {empty.id}: the tokenizer makes no tokens of its input; give it another input.")


def generation_warnings(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    max_new_tokens: int,
    cut: Cut | None = None,
) -> list[str]:
    """What changes the generations of these rows without being asked for, in sentences; `cut` gets the counts."""
    cut = Cut() if cut is None else cut
    found = []
    unknown = unknown_eos_token_ids(lm)
    if unknown:
        named = ", ".join(map(repr, unknown[:5]))
        found.append(
            f"warning: generations do not end at {named}: the eos_token_id of the checkpoint's generation config must "
            f"be token ids from 0 to {len(lm.head) - 1}."
        )

    prompts = _prompts(tokenizer, rows)
    fits = [fitted(lm, prompt, max_new_tokens) for prompt in prompts]
    cut.new_tokens = sum(room < max_new_tokens for _, room in fits)
    cut.prompts = sum(len(kept) < len(prompt) for prompt, (kept, _) in zip(prompts, fits, strict=True))
    if cut.new_tokens:
        limit = max(len(kept) + room for kept, room in fits if room < max_new_tokens)
        found.append(
            f"warning: {cut.new_tokens} of {len(rows)} rows have fewer than {max_new_tokens} new tokens (the least is "
            f"{min(room for _, room in fits)}), and {cut.prompts} rows lose the beginning of their prompt: the model "
            f"has {limit} positions."
        )
    elif cut.prompts:
        found.append(
            f"warning: {cut.prompts} of {len(rows)} rows lose the beginning of their prompt: score keeps the last "
            f"{MAX_LENGTH} tokens."
        )
    return found


def method_line(lm: CausalLM, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How the model decodes, in words, where that is not in padded batches."""
    method = pick_method(lm, int(tokenizer.pad_token_id), 0)
    if method is PADDED:
        return None
    return f"{type(lm.model).__name__} does not decode exactly in padded batches: rows are generated {method.name}"


@torch.no_grad()
def generate(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    stop_early: bool = True,
) -> Iterator[list[tuple[int, Generation]]]:
    """The greedy continuation of each row's input, a batch at a time, as (number of the row, generation).

    Prompts go in raw: no template, no BOS that the tokenizer does not add itself; or `prompts`, tokenised, in their
    place. A generation stops at one of `eos_token_ids`, after `max_new_tokens`,
    where the model's positions end, or, with
    `stop_early`, when it is settled. Questions go with questions and prompts with those of like length. In float32 the
    tokens are those of decoding each row alone, whatever the model's state: see `decoding_probe`.
    """
    lm.model.eval()
    encoded = _prompts(tokenizer, rows) if prompts is None else prompts
    windows = [max(WINDOW, 2 * len(ids)) for ids in encode_texts(tokenizer, [" " + row.output for row in rows])]
    refuse_empty_prompts(rows, encoded)
    refuse_unknown_ids(((f"row {row.id}", ids) for row, ids in zip(rows, encoded, strict=True)), lm)
    fits = [fitted(lm, ids, max_new_tokens) for ids in encoded]
    for batch in _batches(rows, encoded, fits, batch_size):

        def done(number: int, ids: Sequence[int], batch: list[int] = batch) -> bool:
            """Whether the row is past its window and settled."""
            past = len(ids) - windows[batch[number]]
            if not stop_early or past < 0 or past % STRIDE:
                return False
            return settled(rows[batch[number]], spoken(tokenizer, ids, 0, "").text)

        said = _decode(lm, tokenizer, [fits[i][0] for i in batch], [fits[i][1] for i in batch], done)
        yield [(i, spoken(tokenizer, ids, windows[i], ended)) for i, (ids, ended) in zip(batch, said, strict=True)]


def _decode(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    done: Callable[[int, Sequence[int]], bool],
) -> list[tuple[list[int], str]]:
    """The new tokens of each prompt of one batch, at most so many as its limit, and how they ended."""
    ends = eos_token_ids(lm, tokenizer)
    said: list[list[int]] = [[] for _ in prompts]
    ended = ["limit"] * len(prompts)

    def choose(rows: Sequence[int], scores: Tensor) -> list[int | None]:
        tokens: list[int | None] = []
        for row, token in zip(rows, greedy_tokens(scores, "a generated token").tolist(), strict=True):
            said[row].append(token)
            if token in ends:
                ended[row] = "eos"
            elif done(row, said[row]):
                ended[row] = "settled"
            goes_on = ended[row] == "limit" and len(said[row]) < limits[row]
            tokens.append(token if goes_on else None)
        return tokens

    decode_exactly(lm, Prompts(prompts, int(tokenizer.pad_token_id), max(limits)), choose)
    return list(zip(said, ended, strict=True))
