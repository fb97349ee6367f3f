"""Counting live tensors, and what a CPU holds in addition."""

import pytest
import torch

from neko_lean.memory.live_tensors import MMAP_THRESHOLD, LiveTensors


def test_bytes_are_counted_until_their_storage_is_freed():
    with LiveTensors() as live:
        first = torch.zeros(1000)
        second = first + 1
        view = second[:10]
        del first
        assert live.now == 4000 and live.peak == 8000
        del second
        assert live.now == 4000  # the view keeps the storage
        del view
        assert live.now == 0
        torch.zeros(10).add_(1)
    assert live.peak == 8000 and live.largest == 4000


def test_the_heaps_peak_and_the_mapped_peak_add_up():
    with LiveTensors() as live:
        small = [torch.empty(MMAP_THRESHOLD // 2, dtype=torch.uint8) for _ in range(3)]
        del small
        large = torch.empty(2 * MMAP_THRESHOLD, dtype=torch.uint8)
        del large
    assert live.peak == 2 * MMAP_THRESHOLD
    assert live.resident == 3 * MMAP_THRESHOLD // 2 + 2 * MMAP_THRESHOLD  # the heap does not shrink


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bfloat16_weight_gradient_is_accumulated_in_float32(dtype):
    delta, hidden = torch.randn(8, 3000).to(dtype), torch.randn(8, 128).to(dtype)
    with LiveTensors() as live:
        product = delta.T @ hidden
        expected = product.nbytes + (4 * product.numel() if dtype == torch.bfloat16 else 0)
        assert live.resident == expected and live.peak == product.nbytes
        delta @ torch.zeros(3000, 8, dtype=dtype)  # nothing is transposed, so there is no scratch
        assert live.resident == max(expected, live.peak)
