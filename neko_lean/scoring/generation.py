"""Greedy decoding in batches, whatever generation config came with the checkpoint.

A row stops early once nothing that it could still say would change any of its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, cast

import torch
from transformers import DynamicCache

from neko_lean.data import Row, encode_texts, length_batches, pad
from neko_lean.finite import likeliest
from neko_lean.modeling import CausalLM
from neko_lean.ranks import share
from neko_lean.scoring.scripts import bare
from neko_lean.scoring.task import regurgitation, same_answers, unicode_regurgitation
from neko_lean.vocabulary import refuse_unknown_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Leaks and brokenness are judged by a generation's first tokens: so many, or twice the answer's where that is more.
WINDOW = 64
STRIDE = 16  # tokens between two looks at whether a row is settled


@dataclass(frozen=True)
class Generation:
    """What a model said to a prompt. `window` is the text of its first tokens; `ended` is 'eos', 'limit', or 'settled'
    for one that was stopped since its numbers could change no more."""

    text: str
    window: str
    ended: str


def settled(row: Row, text: str) -> bool:
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
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """Numbers of the rows that this rank is to generate: all of its share of the batches, so that `generate` of these
    rows makes the very batches that one process makes of all, and their texts are the same in any dtype."""
    encoded = _prompts(tokenizer, rows) if prompts is None else prompts
    return sorted(i for batch in share(_batches(rows, encoded, batch_size)) for i in batch)


def _prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[list[int]]:
    return encode_texts(tokenizer, [row.input for row in rows])


def _batches(rows: Sequence[Row], prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Numbers of the rows, questions with questions and prompts with those of like length: full batches, and for each
    kind of row one at its end that may not be."""
    found = []
    for kind in ("qa", "sc"):
        own = [i for i, row in enumerate(rows) if row.kind == kind]
        lengths = [len(prompts[i]) for i in own]
        batches = length_batches(lengths, max_rows=batch_size, max_tokens=sum(lengths) * batch_size)
        found += [[own[i] for i in batch] for batch in batches]
    return found


@torch.no_grad()
def generate(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    stop_early: bool = True,
) -> Iterator[list[tuple[int, Generation]]]:
    """The greedy continuation of each row's input, a batch at a time, as (number of the row, generation).

    Prompts go in raw: no template, no BOS that the tokenizer does not add itself; or `prompts`, tokenised, in their
    place. A generation stops at EOS, after `max_new_tokens`, or, with `stop_early`, when it is settled. Questions go
    with questions and prompts with those of like length, padded left, which in float32 gives the tokens of decoding
    each alone.
    """
    lm.model.eval()
    encoded = _prompts(tokenizer, rows) if prompts is None else prompts
    windows = [max(WINDOW, 2 * len(ids)) for ids in encode_texts(tokenizer, [" " + row.output for row in rows])]
    refuse_unknown_ids(((f"row {row.id}", ids) for row, ids in zip(rows, encoded, strict=True)), lm)
    for batch in _batches(rows, encoded, batch_size):

        def done(number: int, ids: Sequence[int], batch: list[int] = batch) -> bool:
            """Whether the row is past its window and settled."""
            past = len(ids) - windows[batch[number]]
            if not stop_early or past < 0 or past % STRIDE:
                return False
            return settled(rows[batch[number]], spoken(tokenizer, ids, 0, "").text)

        said = _decode(lm, tokenizer, [encoded[i] for i in batch], max_new_tokens, done)
        yield [(i, spoken(tokenizer, ids, windows[i], ended)) for i, (ids, ended) in zip(batch, said, strict=True)]


def _decode(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    done: Callable[[int, Sequence[int]], bool],
) -> list[tuple[list[int], str]]:
    """The new tokens of each prompt of one batch, and how they ended. Rows that have ended leave the batch, so that one
    long answer does not keep all others running; transformers' generate pads them on."""
    eos = tokenizer.eos_token_id
    ids, mask = pad(prompts, int(tokenizer.pad_token_id), lm.device, left=True)
    cache = DynamicCache(config=lm.model.config)
    takes_positions = "position_ids" in signature(lm.backbone.forward).parameters
    said: list[list[int]] = [[] for _ in prompts]
    ended = ["limit"] * len(prompts)
    alive = list(range(len(prompts)))  # what row each place of the batch holds
    for _ in range(max_new_tokens):
        more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]} if takes_positions else {}
        out = lm.backbone(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        token = likeliest(lm.logits(out.last_hidden_state[:, -1]), "a generated token")  # [alive]
        keep = []
        for place, (row, one) in enumerate(zip(alive, token.tolist(), strict=True)):
            said[row].append(one)
            if one == eos:
                ended[row] = "eos"
            elif done(row, said[row]):
                ended[row] = "settled"
            else:
                keep.append(place)
        if not keep:
            break
        if len(keep) < len(alive):
            alive = [alive[place] for place in keep]
            chosen = torch.tensor(keep, device=lm.device)
            token, mask = token[chosen], mask[chosen]
            cache.batch_select_indices(chosen)
        ids, mask = token[:, None], torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return list(zip(said, ended, strict=True))
