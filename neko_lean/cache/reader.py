"""Read a teacher cache: memory-mapped, rows by id in any order, refused when it was made from something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from neko_lean.cache.format import CacheError, Shard, file_sha256, id_dtype, read_manifest
from neko_lean.data import Encoded

_DTYPES = {np.uint16: "U16", np.int32: "I32"}


class TeacherCache:
    """The rows of one cache folder. A shard is checked against its SHA-256 when it is first needed, then mapped."""

    def __init__(self, folder: str | Path) -> None:
        """Read the manifest of `folder`. Raises CacheError when it is no complete cache of this format."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CacheError(f"{self.folder} does not exist: make it with cache-teacher.")
        self.manifest = read_manifest(self.folder)
        self._open: dict[str, Any] = {}
        # id -> (shard, first position, positions, digest)
        self._rows: dict[str, tuple[Shard, int, int, str]] = {}
        for shard in self.manifest.shards:
            start = 0
            for row_id, positions, digest in shard.rows:
                self._rows[row_id] = (shard, start, positions, digest)
                start += positions

    def check(self, *, weights: str, tokenizer: str, style: str, max_length: int, encoded: Sequence[Encoded]) -> None:
        """Raise CacheError, naming what differs, unless this cache was made from the same as it is used with.

        A cache of longer rows serves a shorter limit: a causal teacher's first positions do not see the rest.
        """
        made = self.manifest
        if made.weights != weights:
            raise CacheError(f"{self.folder} was made by another model ({made.model}): cache this one's teacher.")
        if made.tokenizer != tokenizer:
            raise CacheError(f"{self.folder} was made with another tokenizer: run cache-teacher again.")
        if made.format != style:
            raise CacheError(
                f"{self.folder} was made in format {made.format!r}, the recipe wants {style!r}: "
                f"run cache-teacher with --format {style}."
            )
        for one in encoded:
            if one.row.id not in self._rows:
                raise CacheError(f"{self.folder} was made from another retain file: it lacks row {one.row.id!r}.")
            _, _, positions, digest = self._rows[one.row.id]
            if digest != one.row.digest:
                raise CacheError(
                    f"{self.folder} was made from another retain file: the text of row {one.row.id!r} differs."
                )
            if positions < len(one):
                raise CacheError(
                    f"{self.folder} was cut to {made.max_length} tokens, the recipe reads {max_length}: "
                    f"run cache-teacher with --max-length {max_length}."
                )

    def read(self, encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        """The positions of these rows one after another, as `token_stats` takes them.

        Returns (topk_ids [N, k] int64, topk_logp [N, k] float32 with -inf for unused entries, tail_logp [N] float32),
        N the sum of the rows' lengths. The kept probabilities of each position sum to 1 - exp(tail_logp).
        """
        parts = [self._read_row(one.row.id, len(one)) for one in encoded]
        k = max((ids.shape[1] for ids, _, _ in parts), default=0)
        ids = torch.zeros((sum(len(tail) for _, _, tail in parts), k), dtype=torch.int64)
        logp = torch.full(ids.shape, -torch.inf)
        start = 0
        for some_ids, some_logp, _ in parts:
            rows, width = slice(start, start + len(some_ids)), some_ids.shape[1]
            ids[rows, :width] = torch.from_numpy(some_ids)
            logp[rows, :width] = torch.from_numpy(some_logp)
            start = rows.stop
        tail = torch.from_numpy(np.concatenate([tail for _, _, tail in parts]))
        return ids, logp, tail

    def _read_row(self, row_id: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first `count` positions of a row: ids [n, k], logp [n, k], tail_logp [n]."""
        shard, start, _, _ = self._rows[row_id]
        tensors = self._shard(shard)
        where = f"{self.folder / shard.file}, row {row_id!r}"
        offsets = tensors.get_slice("offsets")[start : start + count + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        if first < 0 or (np.diff(offsets) < 1).any():
            raise CacheError(f"{where}: offsets do not rise.")
        flat_ids = tensors.get_slice("ids")[first:last]
        flat_p = tensors.get_slice("scaled_p")[first:last].astype(np.float32)
        tail = tensors.get_slice("tail_logp")[start : start + count]
        if len(flat_ids) != last - first or len(flat_p) != last - first or len(tail) != count:
            raise CacheError(f"{where}: positions lie outside the shard.")
        if (flat_ids >= self.manifest.vocab_size).any() or not (flat_p >= 0).all() or not (tail <= 1e-6).all():
            raise CacheError(f"{where}: holds a token id or probability that cannot be.")
        sizes = np.diff(offsets)
        used = np.arange(sizes.max())[None] < sizes[:, None]  # [n, k]
        ids = np.zeros(used.shape, dtype=np.int64)
        p = np.zeros(used.shape, dtype=np.float32)
        ids[used], p[used] = flat_ids, flat_p
        with np.errstate(divide="ignore"):  # log 0 is the -inf that marks an unused entry
            inside = np.log(-np.expm1(np.minimum(tail, 0)))[:, None]
            logp = np.log(p) - np.log(p.sum(1, keepdims=True)) + inside
        return ids, logp, tail

    def _shard(self, shard: Shard) -> Any:
        if shard.file not in self._open:
            path = self.folder / shard.file
            if not path.is_file():
                raise CacheError(f"{path} is missing: run cache-teacher again.")
            if path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
                raise CacheError(f"{path} is damaged: its checksum differs; run cache-teacher again.")
            try:
                tensors = safe_open(path, framework="np")
                # A slice keeps the map open; its dtype is the header's word, checked before any number is believed.
                found = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
            except Exception as error:
                raise CacheError(f"{path} is not a readable safetensors file ({error}).") from error
            ids = _DTYPES[id_dtype(self.manifest.vocab_size)]  # type: ignore[index]
            if found != {"offsets": "I64", "ids": ids, "scaled_p": "F16", "tail_logp": "F32"}:
                raise CacheError(f"{path} does not hold the tensors of a cache shard.")
            self._open[shard.file] = tensors
        return self._open[shard.file]
