"""Three methods to decode a batch of prompts.

- `decode_padded`: prompts of any lengths, padded left, with a key-value cache; the fastest.
- `decode_cached`: prompts of equal length with transformers' `generate`, whatever state the model keeps.
- `decode_full`: prompts of equal length without a cache, with a forward pass over whole rows for each token.

The last one is exact by definition. `decoding_probe` selects the others only for models in which they decode the same:
padding changes the state of recurrent layers, for example, and shifts learned positions.
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
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from neko_lean.data import pad
from neko_lean.models import CausalLM
from neko_lean.scoring.growing_cache import growing_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Takes the indices of the rows still decoding and their logits [N, V]; returns each row's next token, None to end it.
Choose = Callable[[Sequence[int], Tensor], Sequence[int | None]]
Decode = Callable[[CausalLM, "Prompts", Choose], None]


@dataclass(frozen=True)
class Prompts:
    """One batch to decode.

    Attributes:
        ids: token ids of each prompt, at least one.
        pad_id: the padding token.
        max_new_tokens: maximum number of tokens per row; `Choose` may end a row earlier.
    """

    ids: Sequence[Sequence[int]]
    pad_id: int
    max_new_tokens: int


@torch.no_grad()
def decode_padded(lm: CausalLM, prompts: Prompts, choose: Choose) -> None:
    """Decode prompts of any lengths together, padded left.

    Rows that have ended leave the batch, so one long answer does not keep the other rows running.
    """
    ids, mask = pad(prompts.ids, prompts.pad_id, lm.device, left=True)  # [B, L] each
    cache = growing_cache(lm.model.config)
    takes_positions = "position_ids" in signature(lm.backbone.forward).parameters
    alive = list(range(len(prompts.ids)))  # row at each position of the batch

    for _ in range(prompts.max_new_tokens):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        kwargs = {"position_ids": position_ids} if takes_positions else {}
        out = lm.backbone(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)
        tokens = choose(alive, lm.logits(out.last_hidden_state[:, -1].to(lm.head.dtype)))

        running = [index for index, token in enumerate(tokens) if token is not None]
        if not running:
            return
        if len(running) < len(alive):
            alive = [alive[index] for index in running]
            chosen = torch.tensor(running, device=lm.device)
            mask = mask[chosen]
            cache.batch_select_indices(chosen)

        ids = torch.tensor([[token] for token in tokens if token is not None], device=lm.device)  # [alive, 1]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


@torch.no_grad()
def decode_cached(lm: CausalLM, prompts: Prompts, choose: Choose) -> None:
    """Decode prompts of equal length together with transformers' `generate`.

    `generate` handles the cache and the model inputs, and `choose` picks the tokens. Rows that have ended stay in the
    batch, with padding as input, until all rows have ended.
    """
    is_running = dict.fromkeys(range(len(prompts.ids)), True)

    class ForceChosenToken(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            rows = [row for row, runs in is_running.items() if runs]
            tokens = choose(rows, scores[torch.tensor(rows, device=scores.device)])

            next_ids = torch.full((len(scores),), prompts.pad_id, device=scores.device)
            for row, token in zip(rows, tokens, strict=True):
                is_running[row] = token is not None
                next_ids[row] = prompts.pad_id if token is None else token
            # Greedy search takes the only token whose score is not -inf.
            return torch.full_like(scores, -torch.inf).scatter_(1, next_ids[:, None], 0.0)

    class StopEndedRows(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
            return torch.tensor([not runs for runs in is_running.values()], device=input_ids.device)

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
            logits_processor=LogitsProcessorList([ForceChosenToken()]),
            stopping_criteria=StoppingCriteriaList([StopEndedRows()]),
        )


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the checkpoint's generation config, which `generate` uses for values that its argument leaves unset."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


@torch.no_grad()
def decode_full(lm: CausalLM, prompts: Prompts, choose: Choose) -> None:
    """Decode prompts of equal length together without a cache, with a forward pass over whole rows for each token."""
    ids = torch.tensor(prompts.ids, device=lm.device)  # [B, L]
    alive = list(range(len(prompts.ids)))

    for _ in range(prompts.max_new_tokens):
        tokens = choose(alive, lm.logits(lm.hidden(ids)[:, -1]))

        running = [index for index, token in enumerate(tokens) if token is not None]
        if not running:
            return
        alive = [alive[index] for index in running]
        next_ids = torch.tensor([[token] for token in tokens if token is not None], device=lm.device)
        ids = torch.cat([ids[torch.tensor(running, device=lm.device)], next_ids], dim=1)
