"""Compare a cache with its teacher, by running the teacher again on some examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from neko_lean.cache.planning import ExampleBatch, read_cache_data, teacher_batches
from neko_lean.cache.reader import TeacherCache
from neko_lean.cache.self_generation import self_generated_file
from neko_lean.cache.teacher import hidden_states
from neko_lean.data import Example, RowSource, encode, find_format, read_rows
from neko_lean.errors import CacheError, NekoLeanError
from neko_lean.models import (
    CausalLM,
    identify,
    load_model,
    load_tokenizer,
    model_folder,
    pick_device,
    pick_dtype,
    token_stats,
    usable_length,
)
from neko_lean.options import CacheOptions

# Largest mean KL that rounding explains, by the teacher's dtype. In float32 it is the rounding of the stored float16
# numbers. A bfloat16 forward pass also differs between machines.
MAX_MEAN_KL = {"float32": 1e-5, "bfloat16": 1e-3}


def check_cache(
    folder: str | Path,
    model: str | Path,
    rows: int,
    *,
    retain: RowSource | None = None,
    forget: RowSource | None = None,
    cache: CacheOptions = CacheOptions(),
    device: str | None = None,
) -> dict[str, float]:
    """Run the teacher again on some retain examples, and compare its output with the cache.

    The examples are taken in the batches of the cache's first run, spread evenly over all lengths.

    Args:
        folder: folder that `cache_teacher` wrote.
        model: the teacher, as for `cache_teacher`.
        rows: minimum number of examples, at least 1.
        retain, forget: as for `cache_teacher`. Without `retain`, the rows that the teacher wrote itself.
        cache: how the cache was made: prompt format (by default the one that the cache states), system message, split,
            columns and overlap are used.
        device: 'cpu', 'cuda' or 'cuda:N'; by default the GPU if there is one.

    Returns:
        `rows` and `positions` compared; `kl_mean` and `kl_max`, the KL divergence from the stored to the live
        distribution in nats per position; `mass_mean` and `mass_1st_percentile`, the probability inside the entries.

    Raises:
        CacheError: if the cache was made from something else, or if the mean KL is larger than rounding explains.
    """
    if rows < 1:
        raise NekoLeanError(f"--check must be at least 1, got {rows}.")

    # Check that the cache was made from this model and these examples.
    stored, path = TeacherCache(folder), model_folder(model)
    manifest = stored.manifest
    tokenizer = load_tokenizer(path)
    limit = usable_length(path, manifest.max_length)
    format = manifest.format.split(":")[0] if cache.format == "auto" else cache.format
    prompts = find_format(format, tokenizer, cache.system)
    if retain is None:
        retain_rows: list[Example] = read_rows(self_generated_file(folder))
    else:
        retain_rows = read_cache_data(retain, forget, None, cache).retain
    examples = encode(retain_rows, tokenizer, prompts, limit, windows=True)
    identity = identify(path, tokenizer)
    stored.check(identity, style=prompts.name, max_length=manifest.max_length, encoded=examples)

    # Run the teacher.
    teacher = load_model(path, pick_dtype(manifest.teacher_dtype), pick_device(device))
    teacher.model.eval()
    stored.check_vocabulary(len(teacher.head))
    batches = _first_rows(_spread(teacher_batches(examples, manifest.batch_tokens)), min(rows, len(examples)))
    pad_id = int(tokenizer.pad_token_id)
    comparisons = [_compare(stored, teacher, batch, pad_id) for batch in batches]
    kl = np.concatenate([batch_kl for batch_kl, _ in comparisons])
    mass = np.concatenate([batch_mass for _, batch_mass in comparisons])

    # Compare.
    num_rows = sum(map(len, batches))
    kl_mean = float(kl.mean())
    if not abs(kl_mean) <= MAX_MEAN_KL[manifest.teacher_dtype]:
        raise CacheError(
            f"{folder} does not match its teacher: over {num_rows} rows the KL from cache to teacher is {kl_mean:.2e} "
            f"nats per position, more than rounding explains; run cache-teacher again."
        )
    return {
        "rows": num_rows,
        "positions": len(kl),
        "kl_mean": kl_mean,
        "kl_max": float(kl.max()),
        "mass_mean": float(mass.mean()),
        "mass_1st_percentile": float(np.percentile(mass, 1)),
    }


def _spread(batches: Sequence[ExampleBatch]) -> Iterator[ExampleBatch]:
    """The batches in bit-reversed order: first, middle, quarters, ... Any number of them covers all lengths."""
    for index in sorted(range(len(batches)), key=lambda index: int(f"{index:020b}"[::-1], 2)):
        yield batches[index]


def _first_rows(batches: Iterable[ExampleBatch], rows: int) -> list[ExampleBatch]:
    """The first batches that together have at least `rows` examples."""
    selected: list[ExampleBatch] = []
    for batch in batches:
        if sum(map(len, selected)) >= rows:
            break
        selected.append(batch)
    return selected


@torch.no_grad()
def _compare(cache: TeacherCache, teacher: CausalLM, batch: ExampleBatch, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The KL from cache to teacher in nats, and the probability inside the entries: [P] float64 each."""
    ids, logp, tail_logp = (tensor.to(teacher.device) for tensor in cache.read(batch))
    hidden = hidden_states(teacher, batch, pad_id)
    no_targets = torch.full((len(hidden),), -1, device=teacher.device)
    _, kl = token_stats(hidden, teacher.head, no_targets, ids, logp, tail_logp, transform=teacher.transform)[:2]
    return kl.double().cpu().numpy(), -np.expm1(tail_logp.double().cpu().numpy())
