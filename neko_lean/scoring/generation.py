"""Greedy decoding in batches, with a fixed generation config and never the checkpoint's own.

A row stops early once nothing that it could still say would change any of its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from neko_lean.data import Row, length_batches, pad
from neko_lean.modeling import CausalLM
from neko_lean.scoring.task import regurgitation, same_answers

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
    """Whether the row's score is the same however `text` goes on.

    Cleaning up spaces later can move words together, so that only what it cannot touch counts: all but the spaces of
    an answer to a question, and of a text all but its last two words.
    """
    if row.kind == "qa":
        # An answer like None is read back as nan, so that a NULL would still be right.
        return not any(_bare(one).startswith(_bare(text.rstrip("\ufffd"))) for one in same_answers(row.output))
    return regurgitation(row.output, " ".join(text.split()[:-2])) == 1.0


def _bare(text: str) -> str:
    """Without spaces and case; case folds letter by letter, while lower() looks at what follows."""
    return "".join(text.split()).casefold()


class _Settled(StoppingCriteria):  # type: ignore[misc]
    """Stops each row of a batch once it is past its window and settled."""

    def __init__(self, rows: Sequence[Row], windows: Sequence[int], start: int, decode: Any) -> None:
        self.rows, self.windows, self.start, self.decode = rows, windows, start, decode
        self.ended = [False] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        said = input_ids.shape[1] - self.start
        for number, (row, window) in enumerate(zip(self.rows, self.windows, strict=True)):
            if not self.ended[number] and said >= window and (said - window) % STRIDE == 0:
                self.ended[number] = settled(row, self.decode(input_ids[number, self.start :]))
        return torch.tensor(self.ended, device=input_ids.device)


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
    place. A generation stops at EOS, after `max_new_tokens`, or, with `stop_early`, when it is settled. Special tokens
    are dropped and spaces cleaned up. Questions go with questions and prompts with those of like length, padded left,
    which in float32 gives the tokens of decoding each alone.
    """
    eos, padding = tokenizer.eos_token_id, int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=padding
    )
    lm.model.eval()
    # generate() fills what a config leaves open from the model's own, which came with the checkpoint.
    lm.model.generation_config = config

    def text(ids: Tensor) -> str:
        # Called outright: the option of decode, which the task set, is ignored for BPE by transformers 5.
        return tokenizer.clean_up_tokenization(tokenizer.decode(ids, skip_special_tokens=True))

    encoded = [tokenizer(row.input)["input_ids"] for row in rows] if prompts is None else prompts
    windows = [max(WINDOW, 2 * len(tokenizer(" " + row.output)["input_ids"])) for row in rows]
    for kind in ("qa", "sc"):
        own = [i for i, row in enumerate(rows) if row.kind == kind]
        lengths = [len(encoded[i]) for i in own]
        for some in length_batches(lengths, max_rows=batch_size, max_tokens=sum(lengths) * batch_size):
            batch = [own[i] for i in some]
            input_ids, mask = pad([encoded[i] for i in batch], padding, lm.device, left=True)
            start = input_ids.shape[1]
            stop = _Settled([rows[i] for i in batch], [windows[i] for i in batch], start, text)
            out = lm.model.generate(
                input_ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([stop] if stop_early else []),
            )[:, start:]  # [B, new]
            found = []
            for number, index in enumerate(batch):
                ids = out[number]
                at_eos = eos is not None and bool((ids == eos).any())
                # A row that was stopped is padded until the last of its batch has ended.
                ended = "settled" if stop.ended[number] and not at_eos else "eos" if at_eos else "limit"
                found.append((index, Generation(text(ids), text(ids[: windows[index]]), ended)))
            yield found
