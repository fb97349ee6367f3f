"""Run the teacher once over the retain set and write its top-k probabilities, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from neko_lean import __version__
from neko_lean.cache.format import SCALE, Manifest, Shard, file_sha256, id_dtype, shard_name, write_manifest
from neko_lean.data import FORMATS, Encoded, Row, encode, length_batches, pad, read_rows, truncation_line
from neko_lean.errors import NekoLeanError, staged_folder, sync
from neko_lean.head import CHUNK_ELEMENTS, logits
from neko_lean.modeling import (
    CausalLM,
    load_model,
    load_tokenizer,
    model_folder,
    model_name,
    pick_device,
    pick_dtype,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from neko_lean.progress import Bar, bar, say

SHARD_POSITIONS = 2**16  # positions a shard holds before the next one begins: 25 MB at k = 64
_Positions = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids [n, k], scaled_p [n, k], tail_logp [n] of one row


def cache_teacher(
    model: str | Path,
    retain: str | Path,
    out: str | Path,
    *,
    top_k: int = 64,
    format: str = "neko",
    max_length: int = 512,
    batch_tokens: int = 8192,
    device: str | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Write the teacher cache of `model` over the rows of `retain` to the folder `out`.

    Args:
        model: checkpoint folder or hub name of the teacher.
        retain: parquet, jsonl or csv file, or a folder that holds `retain.*`.
        out: folder to write; it appears only when it is complete.
        top_k: entries a position keeps; at V or more all are kept.
        format: prompt format, 'plain' or 'neko'; the recipe that reads the cache must use the same.
        max_length: tokens a row is cut to.
        batch_tokens: positions of one forward pass, padding included.
        device: 'cpu', 'cuda', 'cuda:N'; by default the GPU where there is one.
        dtype: 'bfloat16' or 'float32', what the teacher runs in.

    Returns the manifest. Raises NekoLeanError for bad input, a full disk, or an `out` that holds something.
    """
    if top_k < 1 or max_length < 1 or batch_tokens < 1:
        raise NekoLeanError("top_k, max_length and batch_tokens must be at least 1.")
    if format not in FORMATS:
        raise NekoLeanError(f"format {format!r} is not one of {', '.join(FORMATS)}.")
    rows = read_rows(retain, "retain")
    place, precision, folder = pick_device(device), pick_dtype(dtype), model_folder(model)
    with staged_folder(Path(out), overwrite) as stage:
        tokenizer = load_tokenizer(folder)
        encoded = encode(rows, tokenizer, format, max_length)
        say(truncation_line(encoded, max_length), quiet)
        teacher = load_model(folder, precision, place)
        teacher.model.eval()
        vocab_size = teacher.head.shape[0]
        with bar("cache-teacher", sum(map(len, encoded)), "tokens", quiet) as progress:
            positions = _teacher_rows(teacher, encoded, top_k, batch_tokens, tokenizer.pad_token_id, progress)
            shards, mean_mass = _write_shards(stage, positions, vocab_size)
        total = sum(map(len, encoded))
        manifest = Manifest(
            written_by=__version__,
            model=model_name(model),
            weights=weights_fingerprint(folder),
            tokenizer=tokenizer_fingerprint(tokenizer),
            format=format,
            max_length=max_length,
            top_k=top_k,
            vocab_size=vocab_size,
            teacher_dtype=dtype,
            rows=len(encoded),
            positions=total,
            entries=total * min(top_k, vocab_size),
            truncated=sum(e.cut > 0 for e in encoded),
            mean_mass=mean_mass,
            shards=shards,
        )
        write_manifest(stage, manifest)
    return manifest


@torch.no_grad()
def _teacher_rows(
    teacher: CausalLM, encoded: Sequence[Encoded], top_k: int, batch_tokens: int, pad_id: int, progress: Bar
) -> Iterator[tuple[Row, _Positions]]:
    """Each row with its stored positions, in batches of like length; the same order on every run."""
    k = min(top_k, teacher.head.shape[0])
    dtype = id_dtype(teacher.head.shape[0])
    chunk = max(1, CHUNK_ELEMENTS // teacher.head.shape[0])
    lengths = [len(e) for e in encoded]
    for batch in length_batches(lengths, max_rows=len(encoded), max_tokens=batch_tokens):
        input_ids, mask = pad([encoded[i].ids for i in batch], pad_id, teacher.device)
        hidden = teacher.hidden(input_ids, mask)[mask.bool()]  # [n, d], real positions only
        parts = [_top(logits(rows, teacher.head), k) for rows in hidden.split(chunk)]
        ids, p, tail = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        arrays = ids.numpy().astype(dtype), (p * SCALE).half().numpy(), tail.numpy()
        start = 0
        for index in batch:
            part = slice(start, start + lengths[index])
            yield encoded[index].row, (arrays[0][part], arrays[1][part], arrays[2][part])
            start = part.stop
        progress.advance(start)


def _top(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits z [c, V] -> ids [c, k], p [c, k] likeliest first, log of the mass outside them [c]. Masks z."""
    lse = z.logsumexp(1, keepdim=True)
    values, ids = z.topk(k, dim=1)
    z.scatter_(1, ids, -torch.inf)
    return ids, (values - lse).exp(), z.logsumexp(1) - lse.squeeze(1)


def _write_shards(folder: Path, rows: Iterator[tuple[Row, _Positions]], vocab_size: int) -> tuple[list[Shard], float]:
    """Write rows as shards; returns them and the mean mass inside the entries, as read back from the tails."""
    written: list[tuple[Path, list[tuple[str, int, str]]]] = []
    pending: list[tuple[Row, _Positions]] = []
    waiting, positions, mass = 0, 0, 0.0

    def flush() -> None:
        nonlocal pending, waiting
        # The number of shards is known only at the end, so a shard gets its final name there.
        path = folder / f".shard-{len(written):05d}.tmp"
        listed = [(row.id, len(tail), row.digest) for row, (_, _, tail) in pending]
        _save_shard(path, [stored for _, stored in pending], vocab_size)
        written.append((path, listed))
        pending, waiting = [], 0

    for row, stored in rows:
        pending.append((row, stored))
        waiting += len(stored[2])
        positions += len(stored[2])
        mass += float(-np.expm1(stored[2].astype(np.float64)).sum())
        if waiting >= SHARD_POSITIONS:
            flush()
    if pending:
        flush()
    shards = []
    for number, (path, listed) in enumerate(written):
        final = folder / shard_name(number, len(written))
        path.replace(final)
        shards.append(Shard(final.name, final.stat().st_size, file_sha256(final), listed))
    return shards, mass / positions


def _save_shard(path: Path, stored: list[_Positions], vocab_size: int) -> None:
    ids = np.concatenate([one[0] for one in stored])  # [P, k]
    tensors = {
        "offsets": np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1],
        "ids": ids.reshape(-1),
        "scaled_p": np.concatenate([one[1] for one in stored]).reshape(-1),
        "tail_logp": np.concatenate([one[2] for one in stored]),
    }
    save_file(tensors, path)
    sync(path)
