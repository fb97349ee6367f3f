"""Rows with a shared prefix: run the prefix once, and the rest of each row on a view of the prefix's key-value cache.

Few-shot prompts share their examples, which are most of their tokens. For models in which this is not exact, such as
recurrent ones, each row runs as a whole.
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

PROBE_LENGTH = 48  # positions of the probe's longest row


@torch.no_grad()
def last_hidden(
    lm: CausalLM, rows: Sequence[list[int]], pad_id: int, *, batch_tokens: int, progress: ProgressBar | None = None
) -> Tensor:
    """Last hidden state of each row's last token, equal to that of running each row alone.

    The batches are divided among the ranks, and every rank returns all states.

    Args:
        lm: the model.
        rows: token ids of each row.
        pad_id: the padding token.
        batch_tokens: maximum number of positions per batch. The shared prefix counts for each row, because each row
            attends to it.
        progress: counts the rows of all ranks.

    Returns:
        [len(rows), d]
    """
    lm.model.eval()

    # Run the shared prefix once, if the model allows it.
    shared = common_prefix(rows)
    if max(map(len, rows)) > batch_length_limit(lm) or not shares_prefixes(lm, pad_id):
        shared = 0
    cache = _prefix_cache(lm, rows[0][:shared]) if shared else None

    # Each rank runs its batches.
    batches = length_batches([len(row) for row in rows], max_rows=len(rows), max_tokens=batch_tokens)
    states = [lm.head.new_empty(0, lm.head.shape[1])]  # [B, d] per batch; a rank may have none
    for batch, batches_of_round in zip(items_of_rank(batches), group_by_round(batches), strict=False):
        input_ids, mask = pad([rows[i][shared:] for i in batch], pad_id, lm.device)  # [B, L] each
        hidden = lm.hidden(input_ids) if cache is None else _continued(lm, cache, input_ids)  # [B, L, d]
        index = torch.arange(len(batch), device=lm.device)
        states.append(hidden[index, mask.sum(1) - 1])
        if progress is not None:
            progress.advance(sum(map(len, batches_of_round)))

    # Every rank gets all of them.
    out = lm.head.new_empty(len(rows), lm.head.shape[1])  # [N, d]
    out[torch.tensor(flatten_in_rank_order(batches), device=lm.device)] = torch.cat(
        all_gather_tensors(torch.cat(states))
    )
    return out


def common_prefix(rows: Sequence[list[int]]) -> int:
    """Number of tokens that all rows begin with, at most one less than the shortest row has."""
    first, last = min(rows), max(rows)  # in lexicographic order, every other row shares what these two share
    longest = min(map(len, rows)) - 1
    return next((index for index in range(longest) if first[index] != last[index]), longest)


def shares_prefixes(lm: CausalLM, pad_id: int) -> bool:
    """Whether rows continued from a shared prefix's cache equal whole rows in this model."""
    return probed(lm, "prefix", lambda: keeps_only_keys_and_values(lm) and _continues_exactly(lm, pad_id))


def _continues_exactly(lm: CausalLM, pad_id: int) -> bool:
    length = int(min(position_limit(lm, PROBE_LENGTH), batch_length_limit(lm))) // 2
    if length < 2:
        return False
    (prefix, *rows), _ = random_rows(lm, (length, 1, length // 2, length), pad_id)
    cache = _prefix_cache(lm, prefix)
    input_ids, mask = pad(rows, pad_id, lm.device)  # [3, L] each
    last = mask.sum(1) - 1
    index = torch.arange(len(rows), device=lm.device)

    _continued(lm, cache, input_ids.flip(0))  # must not change the cache
    hidden = _continued(lm, cache, input_ids)[index, last]  # [3, d]
    logits = lm.logits(hidden).float()  # [3, V]
    return equals_plain(lm, [[*prefix, *row] for row in rows], list(logits[:, None]))


def _prefix_cache(lm: CausalLM, prefix: list[int]) -> Cache:
    """The cache after a prefix, for a model that keeps only keys and values."""
    cache = DynamicCache(config=lm.model.config)
    lm.backbone(input_ids=torch.tensor([prefix], device=lm.device), past_key_values=cache, use_cache=True)
    return _PrefixCache(layers=cache.layers)


def _continued(lm: CausalLM, cache: Cache, input_ids: Tensor) -> Tensor:
    """Hidden states [B, L, d] of right-padded ids [B, L] that follow the cache's prefix."""
    # Positions continue from the cache's length, and rows are padded right, so no mask is needed, as in `hidden`.
    hidden: Tensor = lm.backbone(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden


class _PrefixCache(Cache):
    """The cache of a prefix, from which any number of rows can continue; it never changes.

    While a layer runs, its part of the cache is joined to the rows' keys and values, and the result is not kept.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        # Every layer holds the prefix; a model that updates other layers fails the probe.
        layer = copy.copy(cast(DynamicLayer, self.layers[layer_idx]))
        assert layer.keys is not None and layer.values is not None
        layer.keys = layer.keys.expand(len(key_states), *layer.keys.shape[1:])  # [B, heads, P, width]
        layer.values = layer.values.expand(len(value_states), *layer.values.shape[1:])
        joined: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return joined
