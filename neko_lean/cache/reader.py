"""Read a teacher cache: memory-mapped, rows by id in any order, refused when it was made from something else.

Nothing that is read is believed before it was checked: a damaged or malformed cache ends in a CacheError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from neko_lean.cache.format import SCALE, STORED, Shard, id_dtype
from neko_lean.cache.manifest import read_manifest
from neko_lean.data import EncodedExample, Example
from neko_lean.errors import CacheError, first_line
from neko_lean.models import ModelIdentity, config_differences
from neko_lean.outputs import MANIFEST, file_sha256
from neko_lean.terminal import log_line

_DTYPES = {np.uint16: "U16", np.int32: "I32"}


# How far the sum of a position's entries may be from 1 - exp(tail_logp): relative to it, as each float16 is off by
# 2^-11 at most, and absolutely, for the rounding of a sum over the vocabulary in float32.
MASS_TOLERANCE = 2e-3


SUM_TOLERANCE = 1e-5


ROUNDING = 1e-6  # how far above 0 the log-probability of a certain token may be rounded


PIECE = 2**16  # positions that a sweep over the cache reads at a time


AGAIN = "run cache-teacher again"


class Place(NamedTuple):
    """Where a row lies: `positions` of `shard` from its position `start`."""

    shard: Shard
    start: int
    positions: int


# id -> digest of the text -> where it lies. A forget row and a retain row may share an id.
Places = dict[str, dict[str, Place]]


class TeacherCache:
    """The rows of one cache folder. A shard is checked against its SHA-256 when it is first needed, then mapped."""

    def __init__(self, folder: str | Path) -> None:
        """Read the manifest of `folder`. Raises CacheError when it is no complete cache of this format."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CacheError(f"{self.folder} does not exist: make it with cache-teacher.")
        self.manifest = read_manifest(self.folder / MANIFEST)
        self._open: dict[str, Any] = {}
        self._rows = _places(self.manifest.shards)
        self._forget_rows = _places(self.manifest.forget_shards)

    def check(self, model: ModelIdentity, *, style: str, max_length: int, encoded: Sequence[EncodedExample]) -> None:
        """Raise CacheError, naming what differs, unless this cache was made from the same as it is used with.

        `encoded` are the retain rows. A cache of longer rows serves a shorter limit: a causal teacher's first positions
        do not see the rest.
        """
        self._check_model(model)
        self.check_format(style)
        made = self.manifest
        for one in encoded:
            found = self._rows.get(one.example.id)
            if found is None:
                raise CacheError(f"{self.folder} was made from another retain file: it lacks row {one.example.id!r}.")
            if one.example.digest not in found:
                raise CacheError(
                    f"{self.folder} was made from another retain file: the text of row {one.example.id!r} differs."
                )
            positions = found[one.example.digest].positions
            if positions > len(one) + one.num_truncated:
                raise CacheError(
                    f"{self.folder} splits row {one.example.id!r} into {positions} tokens or more, which are "
                    f"{len(one) + one.num_truncated} now: another neko-lean made it; run cache-teacher again."
                )
            if positions < len(one) <= made.max_length:
                raise CacheError(
                    f"{self.folder} holds {positions} positions of row {one.example.id!r}, the recipe reads "
                    f"{len(one)}: a cache has no EOS after an answer, so set append_eos=false."
                )
            if positions < len(one):
                raise CacheError(
                    f"{self.folder} was cut to {made.max_length} tokens, the recipe reads {max_length}: "
                    f"run cache-teacher with --max-length {max_length}."
                )

    def _check_model(self, model: ModelIdentity) -> None:
        made = self.manifest
        if made.weights != model.weights:
            raise CacheError(f"{self.folder} was made by another model ({made.model}): cache this one's teacher.")
        self.check_tokenizer(model.tokenizer)
        if made.config is None and model.config is not None:
            log_line(
                f"warning: {self.folder} may be of a model with another config.json, whose weights alone are the same: "
                f"it was made before caches said which (format 1); run cache-teacher again to be sure."
            )
        if made.config is None or model.config is None:
            return
        changed = config_differences(made.config, model.config)
        if changed:
            raise CacheError(
                f"{self.folder} was made by a model of the same weights with another {', '.join(changed)} in its "
                f"config.json: run cache-teacher again, or give the config.json that belongs to the weights."
            )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise CacheError unless the cache's rows became tokens as they would now."""
        if self.manifest.tokenizer != fingerprint:
            raise CacheError(f"{self.folder} was made with another tokenizer: run cache-teacher again.")

    def check_format(self, style: str) -> None:
        """Raise CacheError unless the cache's rows have this prompt format."""
        if self.manifest.format != style:
            raise CacheError(
                f"{self.folder} was made in format {self.manifest.format!r}, the recipe wants {style!r}: "
                f"run cache-teacher with --format {style}."
            )

    def check_vocabulary(self, size: int) -> None:
        """Raise CacheError unless the model's head has as many rows (`size`) as the teacher's had."""
        if self.manifest.vocab_size != size:
            raise CacheError(
                f"{self.folder} was made by a model with {self.manifest.vocab_size} tokens in its vocabulary, and this "
                f"one has {size}: run cache-teacher again."
            )

    def verify(self) -> None:
        """Read and check all of the cache: every checksum and number, the manifest's totals, and stray files.

        Raises CacheError naming the first file in which something is wrong.
        """
        self.verify_numbers()
        made = self.manifest
        known = {MANIFEST, *(shard.file for shard in (*made.shards, *made.forget_shards))}
        strangers = sorted(path.name for path in self.folder.iterdir() if path.name not in known)
        if strangers:
            raise CacheError(f"{self.folder} holds {strangers[0]!r}, which is no part of the cache: remove it.")

    def verify_numbers(self) -> None:
        """Read and check every checksum and number, and the manifest's totals. Raises CacheError as `verify` does."""
        made = self.manifest
        entries, tail_mass = 0, 0.0
        for sizes, _, _, tail in self.sweep():
            entries += int(sizes.sum())
            tail_mass += float(np.exp(tail.astype(np.float64)).sum())
        for shard in made.forget_shards:
            self._target_logp(shard, 0, shard.positions)

        mean_mass = 1 - tail_mass / made.positions
        if entries != made.entries:
            raise CacheError(f"{self.folder / MANIFEST} says {made.entries} entries, but the shards hold {entries}.")
        if not abs(mean_mass - made.mean_mass) <= 1e-6:
            raise CacheError(
                f"{self.folder / MANIFEST} says a mean_mass of {made.mean_mass:.7f}, but that of the shards is "
                f"{mean_mass:.7f}."
            )

    def sweep(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """All positions of the retain shards in order, a piece at a time, as `raw` returns them."""
        for shard in self.manifest.shards:
            for start in range(0, shard.positions, PIECE):
                yield self.raw(shard, start, min(start + PIECE, shard.positions))

    def read(self, encoded: Sequence[EncodedExample]) -> tuple[Tensor, Tensor, Tensor]:
        """The positions of these rows one after another, as `token_stats` takes them.

        Returns (topk_ids [N, k] int64, topk_logp [N, k] float32 with -inf for unused entries, tail_logp [N] float32),
        N the sum of the rows' lengths. The kept probabilities of each position sum to 1 - exp(tail_logp).
        """
        parts = [self._read_row(one.example, len(one)) for one in encoded]
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

    def has_target_logp(self, one: EncodedExample) -> bool:
        """Whether the teacher's log-probabilities of this row's tokens are in the cache."""
        return one.example.id in self._forget_rows

    def target_logp(self, one: EncodedExample) -> np.ndarray:
        """The teacher's log-probability, in nats, of every token of a row but its first: [len(one) - 1] float32.

        Raises CacheError when the cache was made without them: only forget rows, their refusals and the anchor's
        documents have them.
        """
        found = self._forget_rows.get(one.example.id)
        if found is None:
            raise CacheError(f"{self.folder} holds no token losses of row {one.example.id!r}: cache it with --forget.")
        place = found.get(one.example.digest)
        if place is None or not len(one) - 1 <= place.positions <= max(0, len(one) + one.num_truncated - 1):
            raise CacheError(
                f"{self.folder}: row {one.example.id!r} has another text or other tokens, or was cut shorter."
            )
        shard, start, _ = place
        return self._target_logp(shard, start, start + len(one) - 1)

    def _target_logp(self, shard: Shard, start: int, stop: int) -> np.ndarray:
        """Log-probabilities start..stop of a forget shard, each finite and not positive."""
        values = _slice(self.shard(shard), "target_logp", start, stop)
        wrong = ~(np.isfinite(values) & (values <= ROUNDING))
        if wrong.any():
            raise CacheError(
                f"{self.folder / shard.file}: target_logp {start + int(wrong.argmax())} is {values[wrong][0]}, which "
                f"is no logarithm of a probability above 0; run cache-teacher again."
            )
        return values

    def _read_row(self, row: Example, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first `count` positions of a row: ids [n, k], logp [n, k], tail_logp [n]."""
        found = self._rows.get(row.id, {})
        # `check` has compared the texts; the digest only tells two rows of one id apart.
        place = next(iter(found.values())) if len(found) == 1 else found.get(row.digest)
        if place is None or place.positions < count:
            raise CacheError(f"{self.folder} does not hold {count} positions of row {row.id!r}.")
        shard, start, _ = place
        sizes, flat_ids, flat_p, tail = self.raw(shard, start, start + count)
        used = np.arange(sizes.max(initial=1))[None] < sizes[:, None]  # [n, k]
        ids = np.zeros(used.shape, dtype=np.int64)
        p = np.zeros(used.shape, dtype=np.float32)
        ids[used], p[used] = flat_ids, flat_p
        with np.errstate(divide="ignore"):  # log 0 is the -inf that marks an unused entry
            inside = np.log(-np.expm1(tail))[:, None]
            logp = np.log(p) - np.log(p.sum(1, keepdims=True)) + inside
        return ids, logp, tail

    def raw(self, shard: Shard, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions start..stop of a shard as they are stored, checked against FORMAT.md.

        Returns (sizes [n] int64, ids [E], p [E] float32, tail_logp [n] float32).
        """
        tensors, where = self.shard(shard), f"{self.folder / shard.file}, positions {start} to {stop}"
        offsets = _slice(tensors, "offsets", start, stop + 1)
        entries = tensors.get_slice("ids").get_shape()[0]
        ends = (start == 0 and offsets[0] != 0) or (stop == shard.positions and offsets[-1] != entries)
        if ends or (offsets < 0).any() or (offsets > entries).any() or (offsets[1:] <= offsets[:-1]).any():
            raise CacheError(f"{where}: offsets do not rise from 0 to the number of entries; {AGAIN}.")
        sizes = np.diff(offsets)
        if (sizes > self.manifest.top_k).any():
            raise CacheError(f"{where}: a position has {sizes.max()} entries, top_k is {self.manifest.top_k}; {AGAIN}.")
        ids = _slice(tensors, "ids", int(offsets[0]), int(offsets[-1]))
        p = _slice(tensors, "scaled_p", int(offsets[0]), int(offsets[-1])).astype(np.float32) / SCALE
        tail = _slice(tensors, "tail_logp", start, stop)
        wrong = self._wrong(sizes, ids, p, tail)
        if wrong is not None:
            raise CacheError(f"{where}: {wrong}; {AGAIN}.")
        return sizes, ids, p, tail

    def _wrong(self, sizes: np.ndarray, ids: np.ndarray, p: np.ndarray, tail: np.ndarray) -> str | None:
        """What FORMAT.md does not allow among the entries of n positions: sizes [n], ids [E], p [E], tail [n]."""
        vocab_size = self.manifest.vocab_size
        position = np.repeat(np.arange(len(sizes)), sizes)  # [E], to which position an entry belongs
        first = np.cumsum(sizes) - sizes  # [n], each position's first entry
        unknown = (ids < 0) | (ids >= vocab_size)
        if unknown.any():
            return f"token id {ids[unknown][0]} is not in the vocabulary of {vocab_size}"
        pairs = np.sort(position * vocab_size + ids)
        if (pairs[1:] == pairs[:-1]).any():
            return "a position holds a token id twice"
        broken = ~(np.isfinite(p) & (p >= 0))
        if broken.any():
            return f"a stored probability is {p[broken][0]}"
        if (np.diff(p)[np.diff(position) == 0] > 0).any():
            return "entries are not sorted by probability"
        # Of version 1 some entries underflowed to 0; a reader takes them for part of the tail.
        if (p[first] if self.manifest.format_version == 1 else p).min(initial=1.0) <= 0:
            return "a stored probability is 0"
        if not (tail < 0).all():
            return f"tail_logp {tail[~(tail < 0)][0]} is not the logarithm of a probability below 1"
        # That of an empty tail is minus infinity, and all that is inside then sums to 1.
        inside = -np.expm1(tail.astype(np.float64))  # [n]
        total = np.add.reduceat(p.astype(np.float64), first)  # [n]
        if not (np.abs(total - inside) <= MASS_TOLERANCE * inside + SUM_TOLERANCE).all():
            return "probabilities do not sum to 1"
        return None

    def shard(self, shard: Shard) -> Any:
        """The mapped tensors of a shard, after its checksum and its header were found right."""
        if shard.file not in self._open:
            path = self.folder / shard.file
            if path.is_symlink() or not path.is_file():
                raise CacheError(f"{path} is missing: run cache-teacher again.")
            if path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
                raise CacheError(f"{path} is damaged: its checksum differs; run cache-teacher again.")
            try:
                tensors = safe_open(path, framework="np")
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                found = {name: (one.get_dtype(), list(one.get_shape())) for name, one in slices.items()}
            except Exception as error:
                raise CacheError(
                    f"{path} is not a readable safetensors file ({first_line(error)}); {AGAIN}."
                ) from error
            if found != self._header(shard, found):
                listed = [f"{name!r} {dtype} {shape}" for name, (dtype, shape) in sorted(found.items())][:5]
                raise CacheError(
                    f"{path} holds {', '.join(listed) or 'no tensor'}, which are not the tensors of a cache shard; "
                    f"{AGAIN}."
                )
            self._open[shard.file] = tensors
        return self._open[shard.file]

    def _header(self, shard: Shard, found: dict[str, Any]) -> dict[str, Any]:
        """The header that a shard must have; the number of entries is its own to say."""
        if shard in self.manifest.forget_shards:
            return {"target_logp": ("F32", [shard.positions])}
        entries = found["ids"][1] if "ids" in found else None
        if entries is None or len(entries) != 1:
            return {}
        return {
            "offsets": ("I64", [shard.positions + 1]),
            "ids": (_DTYPES[id_dtype(self.manifest.vocab_size)], entries),
            "scaled_p": (STORED[self.manifest.stored_dtype], entries),
            "tail_logp": ("F32", [shard.positions]),
        }


def _slice(tensors: Any, name: str, start: int, stop: int) -> np.ndarray:
    """tensors[name][start:stop] of a mapped file, whose own slices may not be empty at the end of a tensor."""
    part: np.ndarray = tensors.get_slice(name)[start:stop] if start < stop else tensors.get_tensor(name)[:0]
    return part


def _places(shards: Sequence[Shard]) -> Places:
    """Where every row of these shards lies."""
    places: Places = {}
    for shard in shards:
        start = 0
        for row_id, positions, digest in shard.rows:
            places.setdefault(row_id, {})[digest] = Place(shard, start, positions)
            start += positions
    return places
