"""The cache with room holds what transformers' DynamicCache holds."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from neko_lean.scoring import growing_cache as module
from neko_lean.scoring.growing_cache import GrowingLayer, growing_cache
from tests.helpers import SIZES


@pytest.mark.parametrize("room", [0, 2, 64])
def test_keys_and_values_are_those_of_a_dynamic_cache(monkeypatch, room):
    monkeypatch.setattr(module, "ROOM", room)
    config = LlamaConfig(**SIZES)
    growing, reference = growing_cache(config), DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    rows = 4
    for length, chosen in ((5, None), (1, None), (1, [0, 3]), (1, None), (3, [1]), (1, None)):
        for layer in range(config.num_hidden_layers):
            new = torch.randn(2, rows, 3, length, 8, generator=generator)  # keys and values [B, heads, L, width]
            for actual, expected in zip(growing.update(*new, layer), reference.update(*new, layer), strict=True):
                assert torch.equal(actual, expected)
        if chosen is not None:
            rows = len(chosen)
            growing.batch_select_indices(torch.tensor(chosen))
            reference.batch_select_indices(torch.tensor(chosen))
        assert growing.get_seq_length() == reference.get_seq_length()


def test_a_token_is_written_without_copying_the_cache():
    cache = growing_cache(LlamaConfig(**SIZES))
    pointers = []
    for length in (5, *[1] * module.ROOM, 1):
        keys, _ = cache.update(*torch.zeros(2, 1, 3, length, 8), 0)
        pointers.append(keys.data_ptr())
    assert len(set(pointers[:-1])) == 1 and pointers[-1] != pointers[0]


def test_sliding_windows_keep_transformers_layer():
    from transformers import Gemma2Config

    config = Gemma2Config(**SIZES, sliding_window=4)
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    assert [type(layer) is GrowingLayer for layer in growing_cache(config).layers] == [
        kind.__name__ == "DynamicLayer" for kind in kinds
    ]
    assert len(set(kinds)) == 2
