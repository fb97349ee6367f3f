"""Three ways to decode a batch of prompts, and which of them a model decodes exactly in.

- `decode_padded`: prompts of any lengths together, padded left, with transformers' key-value cache. The fastest.
- `decode_cached`: prompts of one length together by transformers' own `generate`, with whatever state the model keeps.
- `decode_full`: prompts of one length together without any cache, each token by a forward pass over the whole row.

The last is exact by definition. The others are used only for models that `decoding_probe` has seen decode as the last
one does: recurrent layers run over padding, and learned positions are shifted by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from neko_lean.data import pad
from neko_lean.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Given the numbers of the rows still decoding and their logits [n, V], the next token of each; None ends a row.
Choose = Callable[[Sequence[int], Tensor], Sequence[int | None]]


Decode = Callable[[CausalLM, "Prompts", Choose], None]


@dataclass(frozen=True)
class Prompts:
    """One batch to decode.

    Attributes:
        ids: tokens of each prompt, at least one.
        pad_id: token that fills the places of padding; no row sees it.
        max_new_tokens: upper bound on the tokens of every row; `Choose` may end a row earlier.
    """

    ids: Sequence[Sequence[int]]
    pad_id: int
    max_new_tokens: int


@torch.no_grad()
def decode_padded(lm: CausalLM, prompts: Prompts, choose: Choose) -> None:
    """Decode prompts of any lengths together, padded left.

    Rows that have ended leave the batch, so that one long answer does not keep all others running.
    """
    ids, mask = pad(prompts.ids, prompts.pad_id, lm.device, left=True)  # [B, L] each
    cache = DynamicCache(config=lm.model.config)
    takes_positions = "position_ids" in signature(lm.backbone.forward).parameters
    alive = list(range(len(prompts.ids)))  # the row in each place of the batch

    for _ in range(prompts.max_new_tokens):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        kwargs = {"position_ids": position_ids} if takes_positions else {}
        out = lm.backbone(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)
        tokens = choose(alive, lm.logits(out.last_hidden_state[:, -1].to(lm.head.dtype)))

        places = [place for place, token in enumerate(tokens) if token is not None]
        if not places:
            return
        if len(places) < len(alive):
            alive = [alive[place] for place in places]
            chosen = torch.tensor(places, device=lm.device)
            mask = mask[chosen]
            cache.batch_select_indices(chosen)

        ids = torch.tensor([[token] for token in tokens if token is not None], device=lm.device)  # [alive, 1]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


@torch.no_grad()
def decode_cached(lm: CausalLM, prompts: Prompts, choose: Choose) -> None:
    """Decode prompts of one length together by transformers' own `generate`.

    Only its cache and its model inputs are used: `choose` picks the tokens. Rows that have ended stay in the batch, and
    are fed padding, until all have ended.
    """
    running = dict.fromkeys(range(len(prompts.ids)), True)

    class Chosen(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            rows = [row for row, runs in running.items() if runs]
            tokens = choose(rows, scores[torch.tensor(rows, device=scores.device)])

            next_ids = torch.full((len(scores),), prompts.pad_id, device=scores.device)
            for row, token in zip(rows, tokens, strict=True):
                running[row] = token is not None
                next_ids[row] = prompts.pad_id if token is None else token
            # greedy search takes the one token that is not at -inf
            return torch.full_like(scores, -torch.inf).scatter_(1, next_ids[:, None], 0.0)

    class Ended(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
            return torch.tensor([not runs for runs in running.values()], device=input_ids.device)

    config = GenerationConfig(
        do_sample=False, max_new_tokens=prompts.max_new_tokens, pad_token_id=prompts.pad_id, use_cache=True
    )
    input_ids = torch.tensor(prompts.ids, device=lm.device)  # [B, L]
    with _generation_config(lm.model, config):
        generate = cast("Callable[..., object]", lm.model.generate)
        generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([Chosen()]),
            stopping_criteria=StoppingCriteriaList([Ended()]),
        )


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the checkpoint's generation config: `generate` takes from it whatever its own argument leaves open."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


@torch.no_grad()
def decode_full(lm: CausalLM, prompts: Prompts, choose: Choose) -> None:
    """Decode prompts of one length together without a cache: a forward pass over the whole rows for each token."""
    ids = torch.tensor(prompts.ids, device=lm.device)  # [B, L]
    alive = list(range(len(prompts.ids)))

    for _ in range(prompts.max_new_tokens):
        tokens = choose(alive, lm.logits(lm.hidden(ids)[:, -1]))

        places = [place for place, token in enumerate(tokens) if token is not None]
        if not places:
            return
        alive = [alive[place] for place in places]
        next_ids = torch.tensor([[token] for token in tokens if token is not None], device=lm.device)
        ids = torch.cat([ids[torch.tensor(places, device=lm.device)], next_ids], dim=1)
