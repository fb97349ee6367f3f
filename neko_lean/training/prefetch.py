"""Prepare the next batch while the current one is in use."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[], T]) -> Generator[T, None, None]:
    """Yield results of `make` without end. Each is made in another thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make)
        while True:
            result = future.result()
            future = pool.submit(make)
            yield result
