"""Rows that begin alike: run what they share once, and the rest of each on a view of its key-value cache.

Few-shot prompts share their examples, which are most of their tokens. Models for which this is not exact, such as
recurrent ones, run each row whole.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from neko_lean.data import length_batches, pad
from neko_lean.distributed import all_gather_tensors, flatten_in_rank_order, group_by_round, items_of_rank
from neko_lean.models import CausalLM, position_limit
from neko_lean.scoring.decoding_probe import (
    batch_length_limit,
    equals_plain,
    keeps_only_keys_and_values,
    probed,
    random_rows,
)
from neko_lean.terminal import ProgressBar

PROBE_LENGTH = 48  # positions of the longest row of the probe


@torch.no_grad()
def last_hidden(
    lm: CausalLM, rows: Sequence[list[int]], pad_id: int, *, batch_tokens: int, progress: ProgressBar | None = None
) -> Tensor:
    """Last hidden state of each row's last token: [len(rows), d], as each row alone would have it.

    A batch has at most `batch_tokens` positions, what the rows share counted for each, because each attends to it.
    The ranks share the batches out, and each has all rows' states. `progress` counts rows of all ranks.
    """
    lm.model.eval()
    shared = common_prefix(rows)
    if max(map(len, rows)) > batch_length_limit(lm) or not shares_prefixes(lm, pad_id):
        shared = 0
    cache = _prefix_cache(lm, rows[0][:shared]) if shared else None
    batches = length_batches([len(row) for row in rows], max_rows=len(rows), max_tokens=batch_tokens)
    own = [lm.head.new_empty(0, lm.head.shape[1])]  # [B, d] a batch; a rank may have none
    for batch, beside in zip(items_of_rank(batches), group_by_round(batches), strict=False):
        input_ids, mask = pad([rows[i][shared:] for i in batch], pad_id, lm.device)  # [B, L] each
        hidden = lm.hidden(input_ids) if cache is None else _continued(lm, cache, input_ids)  # [B, L, d]
        place = torch.arange(len(batch), device=lm.device)
        own.append(hidden[place, mask.sum(1) - 1])
        if progress is not None:
            progress.advance(sum(map(len, beside)))
    out = lm.head.new_empty(len(rows), lm.head.shape[1])  # [N, d]
    out[torch.tensor(flatten_in_rank_order(batches), device=lm.device)] = torch.cat(all_gather_tensors(torch.cat(own)))
    return out


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, less where a row would have no token of its own left."""
    first, last = min(rows), max(rows)  # whatever the least and the greatest share, all between them do too
    most = min(map(len, rows)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def shares_prefixes(lm: CausalLM, pad_id: int) -> bool:
    """Whether, for this model, rows continued from a shared prefix's cache equal the same rows run whole."""
    return probed(lm, "prefix", lambda: keeps_only_keys_and_values(lm) and _continues_exactly(lm, pad_id))


def _continues_exactly(lm: CausalLM, pad_id: int) -> bool:
    length = int(min(position_limit(lm, PROBE_LENGTH), batch_length_limit(lm))) // 2
    if length < 2:
        return False
    (prefix, *rows), _ = random_rows(lm, (length, 1, length // 2, length), pad_id)
    cache = _prefix_cache(lm, prefix)
    input_ids, mask = pad(rows, pad_id, lm.device)  # [3, L] each
    last = mask.sum(1) - 1
    place = torch.arange(len(rows), device=lm.device)

    _continued(lm, cache, input_ids.flip(0))  # other rows before these must leave nothing behind
    hidden = _continued(lm, cache, input_ids)[place, last]  # [3, d]
    found = lm.logits(hidden).float()  # [3, V]
    return equals_plain(lm, [[*prefix, *row] for row in rows], list(found[:, None]))


def _prefix_cache(lm: CausalLM, prefix: list[int]) -> Cache:
    """The cache after `prefix`, for a model that keeps only keys and values."""
    cache = DynamicCache(config=lm.model.config)
    lm.backbone(input_ids=torch.tensor([prefix], device=lm.device), past_key_values=cache, use_cache=True)
    return _PrefixCache(layers=cache.layers)


def _continued(lm: CausalLM, cache: Cache, input_ids: Tensor) -> Tensor:
    """Hidden states [B, L, d] of right-padded ids [B, L] that follow the cache's prefix."""
    # Positions go on from the cache's length and rows are padded right: as in `hidden`, no mask is needed.
    hidden: Tensor = lm.backbone(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden


class _PrefixCache(Cache):
    """A cache of one row that any number of rows go on from, as often as is wanted: it never changes.

    What a layer needs of it is joined to the rows' own keys and values while that layer runs, and not kept.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        # Each was filled with the prefix; a model that updates others has failed the probe.
        layer = copy.copy(cast(DynamicLayer, self.layers[layer_idx]))
        assert layer.keys is not None and layer.values is not None
        layer.keys = layer.keys.expand(len(key_states), *layer.keys.shape[1:])  # [B, heads, P, width]
        layer.values = layer.values.expand(len(value_states), *layer.values.shape[1:])
        joined: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return joined
